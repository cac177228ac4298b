"""The models that can be encoded, and what vLLM's registry says of them.

A model is known by the class that vLLM would run, not by its architecture's name:
another plugin may have registered that name for a class of its own.
"""

from abc import ABC, abstractmethod
from functools import cache
from typing import TYPE_CHECKING, Any, NamedTuple

from scx import keys

if TYPE_CHECKING:
    from vllm.config import ModelConfig


class Architecture(NamedTuple):
    """A class of vLLM and the class that encodes in its place, each module:class."""

    stock: str
    encoded: str
    norms: bool = False
    """Whether its attention applies RMSNorm to queries and keys."""

    @property
    def name(self) -> str:
        """As a model's config.json has it."""
        return self.stock.split(":")[1]


def _architecture(stock: str, encoded: str, norms: bool = False) -> Architecture:
    stock, encoded = f"vllm.model_executor.models.{stock}", f"scx.models.{encoded}"
    return Architecture(stock, encoded, norms)


ARCHITECTURES = (
    _architecture("ernie45:Ernie4_5ForCausalLM", "ernie45_scx:Ernie4_5SCXForCausalLM"),
    _architecture("llama:LlamaForCausalLM", "llama_scx:LlamaSCXForCausalLM"),
    _architecture("mistral:MistralForCausalLM", "mistral_scx:MistralSCXForCausalLM"),
    _architecture("phi3:Phi3ForCausalLM", "phi3_scx:Phi3SCXForCausalLM"),
    _architecture("qwen2:Qwen2ForCausalLM", "qwen2_scx:Qwen2SCXForCausalLM"),
    _architecture("qwen3:Qwen3ForCausalLM", "qwen3_scx:Qwen3SCXForCausalLM", norms=True),
)


class EncodedModel(ABC):
    """What each encoded model class tells the rest of this package."""

    @abstractmethod
    def encodes(self, layers: list[int]) -> bool:
        """Whether each of these layers that is on this rank has encoded attention."""


@cache
def register() -> None:
    """Register the classes that encode with vLLM, and hold the setting.

    Once per process, and again if it raised: SCXConfigError for a malformed variable.
    No stock name is taken: `configure` names our class in the model's configuration.
    """
    from vllm.model_executor.models import ModelRegistry

    for architecture in ARCHITECTURES:
        name = architecture.encoded.split(":")[1]
        ModelRegistry.register_model(name, architecture.encoded)
    keys.pin_config()


def encoded_architectures() -> dict[str, Architecture]:
    """Every name that vLLM's registry has for a stock class that can be encoded.

    vLLM has several names for some classes: InternLM3 and TeleChat3 are Llama models.
    """
    from vllm.model_executor.models import ModelRegistry

    stock = {each.stock: each for each in ARCHITECTURES}
    return {
        name: stock[path]
        for name, model in ModelRegistry.models.items()
        if (path := _class_path(model)) in stock
    }


def resolve(model_config: "ModelConfig") -> tuple[str, str]:
    """The architecture of a model that vLLM runs, and module:class of what runs it.

    As the registry resolves it in the worker: the first that is registered, by its own
    name or by that of the generating model that vLLM adapts (as for
    ForSequenceClassification). The path is empty if none is.
    """
    registry = model_config.registry
    names = getattr(model_config.hf_config, "architectures", None)
    for name in names or model_config.architectures:
        model = registry.models.get(registry._normalize_arch(name, model_config))
        if model is not None:
            return name, _class_path(model)
    return model_config.architecture, ""


def architecture_of(model_config: "ModelConfig") -> Architecture | None:
    """The row of a model that can be encoded, or None.

    The user may have named the class that encodes, and `configure` may have been here
    before.
    """
    _, path = resolve(model_config)
    return next((each for each in ARCHITECTURES if path in each[:2]), None)


def _class_path(model: Any) -> str:
    """module:class of an entry of vLLM's registry."""
    if (loaded := getattr(model, "model_cls", None)) is not None:
        return f"{loaded.__module__}:{loaded.__qualname__}"
    return f"{model.module_name}:{model.class_name}"
