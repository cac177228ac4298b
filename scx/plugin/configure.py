"""What vLLM is told, and what is refused.

`configure` runs in the process that creates the engine, before weights load; its
record travels to every worker in `additional_config`, which is also part of
vLLM's compile-cache key. Names of vLLM that this leans on are listed, with
versions, in docs/vllm-seams.md.
"""

import hashlib
from collections.abc import Iterator
from functools import cache
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from scx import keys
from scx.devices import cores, placement
from scx.errors import SCXConfigError, SCXUnsupportedError
from scx.keys import (
    CODEC,
    ENC_LAYERS,
    SECURE_DEVICE,
    RootKey,
    SCXConfig,
    get_scx_config,
)
from scx.plugin import kv_store, rotary
from scx.plugin.identity import identity_of

if TYPE_CHECKING:
    from vllm.config import ModelConfig, VllmConfig

ENCODED_CLASSES = {
    f"vllm.model_executor.models.{stock}": f"scx.models.{ours}"
    for stock, ours in {
        "ernie45:Ernie4_5ForCausalLM": "ernie45_scx:Ernie4_5SCXForCausalLM",
        "llama:LlamaForCausalLM": "llama_scx:LlamaSCXForCausalLM",
        "mistral:MistralForCausalLM": "mistral_scx:MistralSCXForCausalLM",
        "phi3:Phi3ForCausalLM": "phi3_scx:Phi3SCXForCausalLM",
        "qwen2:Qwen2ForCausalLM": "qwen2_scx:Qwen2SCXForCausalLM",
        "qwen3:Qwen3ForCausalLM": "qwen3_scx:Qwen3SCXForCausalLM",
    }.items()
}
"""The class that encodes, by the stock class that it stands for: each module:class."""

_NORMED = "scx.models.qwen3_scx:Qwen3SCXForCausalLM"
"""The class that norms queries and keys, which the fused kernels do not."""
_MODEL_FREE_DRAFTS = ("ngram", "ngram_gpu", "suffix")
"""Speculative methods that look drafts up in earlier tokens."""
_QUANTIZATIONS = (
    None,
    "auto_awq",
    "auto_gptq",
    "awq",
    "awq_marlin",
    "compressed-tensors",
    "fp8",
    "gptq",
    "gptq_marlin",
)
"""Formats of weights whose activations, where rounded, are so by token or all alike."""
_RECORD = "scx"


@cache
def register() -> None:
    """Register the classes that encode with vLLM, and hold the setting.

    Once a process, and again where it raised: SCXConfigError for a malformed variable.
    No stock name is taken: `configure` names our class in the model's configuration.
    """
    from vllm.model_executor.models import ModelRegistry

    for path in ENCODED_CLASSES.values():
        ModelRegistry.register_model(_class_name(path), path)
    keys.pin_config()


def encoded_architectures() -> dict[str, str]:
    """The class that encodes, by each architecture that vLLM runs with a stock class.

    vLLM has several names for some classes: InternLM3 and TeleChat3 are Llama models.
    """
    from vllm.model_executor.models import ModelRegistry

    return {
        name: ENCODED_CLASSES[path]
        for name, model in ModelRegistry.models.items()
        if (path := _class_path(model)) in ENCODED_CLASSES
    }


def _class_name(path: str) -> str:
    return path.split(":")[1]


def _class_path(model: Any) -> str:
    """module:class of an entry of vLLM's registry."""
    if (loaded := getattr(model, "model_cls", None)) is not None:
        return f"{loaded.__module__}:{loaded.__qualname__}"
    return f"{model.module_name}:{model.class_name}"


def _chosen(model_config: "ModelConfig") -> tuple[str, str]:
    """The architecture of a model that vLLM runs, and module:class of what runs it.

    As the registry resolves it in the worker: the first that is registered, by its own
    name or by that of the generating model of which vLLM makes it (as for
    ForSequenceClassification). The path is empty where none is.
    """
    registry = model_config.registry
    names = getattr(model_config.hf_config, "architectures", None)
    for name in names or model_config.architectures:
        model = registry.models.get(registry._normalize_arch(name, model_config))
        if model is not None:
            return name, _class_path(model)
    return model_config.architecture, ""


def _encoding_class(model_config: "ModelConfig") -> str:
    """module:class of what encodes a model, empty where nothing does.

    The user may have named it, and `configure` may have been here before.
    """
    _, path = _chosen(model_config)
    return path if path in ENCODED_CLASSES.values() else ENCODED_CLASSES.get(path, "")


def configure(vllm_config: "VllmConfig") -> None:
    """Refuse what cannot be encoded; write the record; choose the graph mode.

    Changes nothing where no layer is to be encoded. Raises SCXConfigError for
    a setting that does not fit the model or changed too late, and
    SCXUnsupportedError for a model or feature that would not run encoded.
    """
    register()
    config = get_scx_config()
    keys.require_unchanged(config)
    if not config.enabled:
        kv_store.require_unlabelled(vllm_config)
        return
    model_config = vllm_config.model_config
    if model_config is None:
        return
    # The first: what follows reads configurations of models that are encoded.
    for obstacle in chain(
        _model_obstacles(model_config), _feature_obstacles(vllm_config, config)
    ):
        raise SCXUnsupportedError(f"{_asked(config)}, but {obstacle}")
    keys.require_key_file(config)
    additional = cast("dict[str, Any]", vllm_config.additional_config)
    additional[_RECORD] = _record(config, model_config) | {
        "model": identity_of(model_config) if config.key_file else "",
        # Here, as the process of a data-parallel replica forgets the others.
        "ranks_here": cores.ranks_here(vllm_config.parallel_config),
    }
    if kv_store.outlives_engine(vllm_config):
        claim_store(vllm_config, root_key(vllm_config))
    # A worker that lacks our variables then builds our class all the same, and
    # that class refuses to run without them.
    model_config.hf_config.architectures = [_class_name(_encoding_class(model_config))]
    if _waits_for_python(config, model_config):
        _use_piecewise_graphs(vllm_config, config)
    vllm_config.compilation_config.pass_config.fuse_attn_quant = False


def root_key(vllm_config: "VllmConfig") -> RootKey:
    """The root key of this engine's model, as this process has it."""
    record: Any = record_of(vllm_config)
    return RootKey.load(get_scx_config()).for_model(record["model"])


def claim_store(vllm_config: "VllmConfig", root: RootKey) -> None:
    """As `kv_store.claim`, with the record of this engine.

    The process that configures the engine does so, to refuse early, and so does each
    worker, which reads the key file of its own machine.
    """
    kv_store.claim(vllm_config, root.fingerprint, record_of(vllm_config) or {})


def uses_host_device(config: SCXConfig, model_config: "ModelConfig") -> bool:
    """Whether the secure step is host work that a CUDA graph can hold."""
    return config.secure_device in ("cpu", "cpu:0") and _has_fused_kernels(model_config)


def uses_accelerator(config: SCXConfig, model_config: "ModelConfig") -> bool:
    """Whether each rank's GPU is its own secure device, all in a CUDA graph.

    A GPU with a number is another device, as any other is: the secure step is
    plain torch operations then, which synchronise with Python.
    """
    return config.secure_device == "cuda" and _has_fused_kernels(model_config)


def _has_fused_kernels(model_config: "ModelConfig") -> bool:
    from vllm.platforms import current_platform

    return current_platform.is_cuda() and _encoding_class(model_config) != _NORMED


def _waits_for_python(config: SCXConfig, model_config: "ModelConfig") -> bool:
    """Whether the secure step synchronises with Python, so no CUDA graph can hold it."""
    return not (
        uses_host_device(config, model_config) or uses_accelerator(config, model_config)
    )


def host_workers(vllm_config: "VllmConfig") -> int:
    """Worker threads of this rank, if the host is the secure device."""
    record: Any = record_of(vllm_config)
    return cores.workers_for(cores.usable_cores(), record["ranks_here"])


def max_step_tokens(vllm_config: "VllmConfig") -> int:
    """The most rows of a step, padding to a captured size included."""
    captured = vllm_config.compilation_config.cudagraph_capture_sizes or [0]
    return max(vllm_config.scheduler_config.max_num_batched_tokens, *captured)


def record_of(vllm_config: "VllmConfig") -> dict[str, Any] | None:
    """What `configure` recorded, or None where no layer is to be encoded."""
    additional = vllm_config.additional_config
    return additional.get(_RECORD) if isinstance(additional, dict) else None


def encoded_layers(vllm_config: "VllmConfig") -> tuple[int, ...]:
    """The layers that this engine encodes, as `configure` recorded them.

    Called in a worker, while the model is built. Raises SCXConfigError where
    this process has another setting than the one that configured the engine,
    and SCXUnsupportedError where the engine was not configured for encoding.
    """
    config = get_scx_config()
    record = record_of(vllm_config)
    if record is None:
        if config.enabled:
            encoded = ", ".join(encoded_architectures())
            raise SCXUnsupportedError(
                f"{_asked(config)}, but this model is part of another architecture or "
                f"was configured without it: encoded are {encoded}"
            )
        return ()
    here = _record(config, vllm_config.model_config)
    for name, value in here.items():
        if record[name] != value:
            raise SCXConfigError(
                f"{name}={value!r} in this worker, but the engine was configured "
                f"with {record[name]!r}: give each worker the same SCX_* variables and "
                "package (with Ray: VLLM_RAY_EXTRA_ENV_VAR_PREFIXES_TO_COPY=SCX_)"
            )
    return tuple(record["layers"])


def _asked(config: SCXConfig) -> str:
    layers = config.enc_layers
    text = layers if layers == "all" else ",".join(map(str, layers))
    return f"{ENC_LAYERS}={text!r} asks for encoding"


def _record(config: SCXConfig, model_config: "ModelConfig") -> dict[str, Any]:
    """All that decides which graph is compiled. Nothing secret."""
    return {
        "layers": list(config.layers_of(model_config.hf_text_config.num_hidden_layers)),
        "codec": config.codec,
        "secure_device": config.secure_device,
        "key_file": config.key_file is not None,
        "sources": _sources_hash(),
    }


def _sources_hash() -> str:
    digest = hashlib.sha256()
    for source in sorted(Path(__file__).parents[1].rglob("*.py")):
        digest.update(source.read_bytes())
    return digest.hexdigest()[:16]


def _model_obstacles(model_config: "ModelConfig") -> Iterator[str]:
    """Why this model cannot be encoded, with the way out."""
    if model_config.model_impl in ("transformers", "terratorch"):
        yield (
            f"model_impl={model_config.model_impl!r} does not use vLLM's model "
            "classes: leave it out"
        )
    architecture, path = _chosen(model_config)
    if not _encoding_class(model_config):
        if not path or path.startswith("vllm."):
            yield (
                f"{architecture} is not encoded: use one of "
                f"{', '.join(encoded_architectures())}, or unset {ENC_LAYERS}"
            )
        else:
            yield (
                f"{architecture} is run by {path} here, not by a class of vLLM that is "
                "encoded: leave out what registered it (a plugin, "
                "ModelRegistry.register_model, model_class_overrides), or unset "
                f"{ENC_LAYERS}"
            )
    if model_config.quantization not in _QUANTIZATIONS:
        yield (
            f"quantization={model_config.quantization!r} was never run encoded: use "
            "AWQ, GPTQ, fp8 or compressed-tensors, or weights that are not quantised"
        )
    hf_config = model_config.hf_text_config
    if getattr(hf_config, "qk_norm", False):
        yield "qk_norm=True is not encoded: use a model without query and key norms"
    if getattr(hf_config, "llama_4_scaling", None):
        yield "llama_4_scaling of the queries is not encoded: use a model without it"
    if getattr(hf_config, "dual_chunk_attention_config", None):
        yield "dual chunk attention is not encoded: drop dual_chunk_attention_config"
    if not getattr(hf_config, "is_causal", True):
        yield (
            "encoder-only attention (is_causal=False) is not encoded: use a model that "
            f"attends to earlier tokens only, or unset {ENC_LAYERS}"
        )
    yield from rotary.obstacles(hf_config, model_config.max_model_len)


def _feature_obstacles(vllm_config: "VllmConfig", config: SCXConfig) -> Iterator[str]:
    """Which feature of vLLM would be wrong or plain, with the way out."""
    if vllm_config.lora_config is not None:
        yield (
            "LoRA picks adapters by row, and rows are shuffled: leave out enable_lora "
            "or merge the adapter into the weights"
        )
    speculative = vllm_config.speculative_config
    if speculative is not None and speculative.method not in _MODEL_FREE_DRAFTS:
        yield (
            f"speculative method {speculative.method!r} may draft with a model, which "
            "computes the same tokens in the clear: use "
            f"{' or '.join(_MODEL_FREE_DRAFTS)}, or leave out speculative_config"
        )
    yield from placement.obstacles(vllm_config, config)
    yield from kv_store.obstacles(vllm_config, config)
    if getattr(vllm_config.model_config, "enable_sleep_mode", False):
        yield "sleep mode may discard the secure step's counters: leave it out"
    if not isinstance(vllm_config.additional_config, dict):
        yield (
            "additional_config is not a dict, so the compile cache could not tell "
            "encoded from plain graphs: pass a dict"
        )
    parallel = vllm_config.parallel_config
    for name in ("decode_context_parallel_size", "prefill_context_parallel_size"):
        if getattr(parallel, name, 1) > 1:
            yield f"{name} merges outputs of several keys: leave it at 1"
    if getattr(parallel, "enable_dbo", False) or getattr(parallel, "ubatch_size", 0) > 1:
        yield (
            "dual batch overlap runs two steps at once in a layer: leave out enable_dbo "
            "and ubatch_size"
        )
    yield from _cache_obstacles(_cache_dtype(vllm_config), config)
    mode = _whole_graphs(vllm_config)
    if mode and _waits_for_python(config, vllm_config.model_config):
        yield (
            f"cudagraph_mode={mode} captures the secure step, which synchronises "
            "with the host: leave it out, or use PIECEWISE or NONE"
        )


def _whole_graphs(vllm_config: "VllmConfig") -> str:
    """The choice of CUDA graphs of whole steps alone, empty where vLLM follows none.

    As in eager mode, on a platform without graphs and for pooling models
    (`VllmConfig.__post_init__`, after `configure`).
    """
    from vllm.config import CUDAGraphMode
    from vllm.platforms import current_platform

    model_config = vllm_config.model_config
    mode = vllm_config.compilation_config.cudagraph_mode
    if (
        mode in (None, CUDAGraphMode.FULL_AND_PIECEWISE)
        or not mode.has_full_cudagraphs()
        or model_config.enforce_eager
        or model_config.pooler_config is not None
        or not current_platform.support_static_graph_mode()
    ):
        return ""
    return mode.name


def _cache_dtype(vllm_config: "VllmConfig") -> str:
    """The type that the KV cache will have.

    vLLM turns `auto` to fp8 while it builds layers whose weights bring scales for it
    (vllm/model_executor/layers/attention/attention.py).
    """
    dtype, model_config = vllm_config.cache_config.cache_dtype, vllm_config.model_config
    weights = getattr(model_config.hf_config, "quantization_config", None)
    brings_scales = (
        model_config.quantization == "compressed-tensors"
        and isinstance(weights, dict)
        and weights.get("kv_cache_scheme")
    )
    return "fp8" if dtype == "auto" and brings_scales else dtype


def _cache_obstacles(cache_dtype: str, config: SCXConfig) -> Iterator[str]:
    """Why encoded keys and values would be rounded otherwise than plain ones."""
    if "fp8" in cache_dtype and config.codec != "permutation":
        yield (
            f"kv_cache_dtype={cache_dtype!r} clips at scales made for K and V as they "
            f"are, and {CODEC}={config.codec!r} stretches them: use auto (bfloat16 or "
            "float16 if the weights bring such scales), or the permutation codec"
        )
    if cache_dtype not in ("auto", "float16", "bfloat16") and "fp8" not in cache_dtype:
        yield (
            f"kv_cache_dtype={cache_dtype!r} may round groups of features, which are "
            "permuted: use auto or an fp8 type"
        )


def require_cache(cache_dtype: str, config: SCXConfig) -> None:
    """Refuse the type that an encoded layer's cache turned out to have."""
    for obstacle in _cache_obstacles(cache_dtype, config):
        raise SCXUnsupportedError(f"{_asked(config)}, but {obstacle}")


def _use_piecewise_graphs(vllm_config: "VllmConfig", config: SCXConfig) -> None:
    """Keep whole-step CUDA graphs off: the secure step synchronises with Python."""
    from vllm.config import CUDAGraphMode
    from vllm.logger import init_logger
    from vllm.platforms import current_platform

    compilation = vllm_config.compilation_config
    if compilation.cudagraph_mode in (None, CUDAGraphMode.FULL_AND_PIECEWISE):
        compilation.cudagraph_mode = CUDAGraphMode.PIECEWISE
        if current_platform.is_cuda_alike():
            init_logger("vllm.scx").warning(
                "SCX: for %s with secure device %s each step waits for Python, so CUDA "
                "graphs are PIECEWISE and decoding is several times slower; whole graphs "
                "need a model without query and key norms and %s=cpu or cuda",
                vllm_config.model_config.architecture,
                config.secure_device,
                SECURE_DEVICE,
            )
