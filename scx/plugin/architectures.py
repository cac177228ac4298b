"""The models that can be encoded, and what vLLM's registry says of them.

A model is known by the class that vLLM would run, not by its architecture's name:
another plugin may have registered that name for a class of its own.
"""

from abc import ABC, abstractmethod
from enum import Enum
from functools import cache
from typing import TYPE_CHECKING, Any, NamedTuple

from scx import keys

if TYPE_CHECKING:
    from vllm.config import ModelConfig


class Trait(Enum):
    """What the attention of an architecture does, or does in some of its models, beyond
    RoPE of queries and keys and a softmax of their products."""

    HEAD_NORMS = "norms of query and key heads"
    PROJECTION_NORMS = "norms of all queries and of all keys of a token"
    ROPE_BY_LAYER = "RoPE that differs by layer"
    SINKS = "attention sinks"
    SOFT_CAPS = "capped scores"


class Architecture(NamedTuple):
    """A class of vLLM and the class that encodes in its place, each module:class."""

    stock: str
    encoded: str
    traits: frozenset[Trait] = frozenset()

    @property
    def name(self) -> str:
        """As a model's config.json has it."""
        return self.stock.split(":")[1]


def _architecture(module: str, model: str, *traits: Trait) -> Architecture:
    """The row of `model` in a module of vLLM; ours has the same names with SCX added."""
    return Architecture(
        f"vllm.model_executor.models.{module}:{model}",
        f"scx.models.{module}_scx:{model.replace('For', 'SCXFor')}",
        frozenset(traits),
    )


ARCHITECTURES = (
    _architecture("commandr", "CohereForCausalLM", Trait.HEAD_NORMS, Trait.ROPE_BY_LAYER),
    _architecture("ernie45", "Ernie4_5ForCausalLM"),
    _architecture("ernie45_moe", "Ernie4_5_MoeForCausalLM"),
    _architecture("exaone4", "Exaone4ForCausalLM", Trait.HEAD_NORMS, Trait.ROPE_BY_LAYER),
    _architecture("gemma", "GemmaForCausalLM"),
    _architecture("gemma2", "Gemma2ForCausalLM", Trait.SOFT_CAPS),
    _architecture("gemma3", "Gemma3ForCausalLM", Trait.HEAD_NORMS, Trait.ROPE_BY_LAYER),
    _architecture("glm4", "Glm4ForCausalLM"),
    _architecture("glm4_moe", "Glm4MoeForCausalLM", Trait.HEAD_NORMS),
    _architecture("gpt_oss", "GptOssForCausalLM", Trait.SINKS),
    _architecture("granite", "GraniteForCausalLM", Trait.ROPE_BY_LAYER),
    _architecture("granitemoe", "GraniteMoeForCausalLM", Trait.ROPE_BY_LAYER),
    _architecture("llama", "LlamaForCausalLM"),
    _architecture("minimax_m2", "MiniMaxM2ForCausalLM", Trait.PROJECTION_NORMS),
    _architecture("mistral", "MistralForCausalLM"),
    _architecture("mixtral", "MixtralForCausalLM"),
    _architecture("olmoe", "OlmoeForCausalLM", Trait.PROJECTION_NORMS),
    _architecture("phi3", "Phi3ForCausalLM"),
    _architecture("qwen2", "Qwen2ForCausalLM", Trait.HEAD_NORMS),
    _architecture("qwen2_moe", "Qwen2MoeForCausalLM"),
    _architecture("qwen2_rm", "Qwen2ForProcessRewardModel", Trait.HEAD_NORMS),
    _architecture("qwen2_rm", "Qwen2ForRewardModel", Trait.HEAD_NORMS),
    _architecture("qwen3", "Qwen3ForCausalLM", Trait.HEAD_NORMS),
    _architecture("qwen3_moe", "Qwen3MoeForCausalLM", Trait.HEAD_NORMS),
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
