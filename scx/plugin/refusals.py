"""Why an engine cannot be encoded: one `yield` per reason, each with the way out.

Each reason ends the sentence "SCX_ENC_LAYERS=... asks for encoding, but ...".
"""

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from scx.codecs.interface import FeatureCodec
from scx.devices import placement
from scx.errors import SCXUnsupportedError
from scx.keys import CODEC, ENC_LAYERS, SCXConfig
from scx.plugin import kv_store, rotary
from scx.plugin.architectures import (
    Architecture,
    Trait,
    architecture_of,
    encoded_architectures,
    resolve,
)
from scx.plugin.plan import EncodingPlan, asked

if TYPE_CHECKING:
    from vllm.config import ModelConfig, VllmConfig

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
"""Weight formats that quantise activations per token or with one scale, so shuffled rows
do not matter."""
_OTHER_SEAMS = {
    "use_mla": "its cache holds latents, from which keys and values are made (MLA)",
    "is_attention_free": "its layers have states in place of keys and values",
    "is_hybrid": "some of its layers have states in place of keys and values",
}
"""What a ModelConfig says of models with another kind of attention, or without any."""
_PLAIN_CACHES = ("auto", "float16", "bfloat16")
_SCALED_CACHES = ("fp8", "fp8_e4m3", "fp8_e5m2", "fp8_inc", "fp8_per_token_head")
"""Types of the KV cache that have one scale per tensor, or per token and head, so they
round features in any order alike."""


def refuse(config: SCXConfig, obstacles: Iterator[str]) -> None:
    """Raise SCXUnsupportedError for the first obstacle, if there is one."""
    if obstacle := next(obstacles, None):
        raise SCXUnsupportedError(f"{asked(config)}, but {obstacle}")


def model_obstacles(model_config: "ModelConfig") -> Iterator[str]:
    """Why this model cannot be encoded, with the way out."""
    if model_config.model_impl in ("transformers", "terratorch"):
        yield (
            f"model_impl={model_config.model_impl!r} does not use vLLM's model "
            "classes: leave it out"
        )
    if architecture_of(model_config) is None:
        architecture, path = resolve(model_config)
        if not path or path.startswith("vllm."):
            seams = _OTHER_SEAMS.items()
            why = [text for name, text in seams if getattr(model_config, name, False)]
            if ".transformers" in path:
                why.append("vLLM runs it in classes of transformers")
            reason = "".join(f", as {each}" for each in why)
            yield (
                f"{architecture} is not encoded{reason}: use one of "
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


def feature_obstacles(vllm_config: "VllmConfig", plan: EncodingPlan) -> Iterator[str]:
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
    yield from placement.obstacles(vllm_config, plan.config)
    yield from kv_store.obstacles(vllm_config, plan.config)
    model_config = vllm_config.model_config
    if model_config.enable_sleep_mode and model_config.sleep_mode_backend != "cumem":
        yield (
            f"sleep_mode_backend={model_config.sleep_mode_backend!r} may copy or lose "
            "the keys of the secure device: use 'cumem'"
        )
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
    traits = plan.architecture.traits
    if Trait.PROJECTION_NORMS in traits and parallel.tensor_parallel_size > 1:
        yield (
            f"{plan.architecture.name} norms queries and keys over all ranks, each of "
            "which shuffles rows in its own order: leave tensor_parallel_size at 1"
        )
    for trait in clashes(plan.codec, plan.architecture):
        yield _shifted(plan, f"{plan.architecture.name} has {trait.value}")
    yield from _cache_obstacles(_cache_dtype(vllm_config), plan)
    mode = _whole_graphs(vllm_config)
    if mode and not plan.device.in_graphs:
        yield (
            f"cudagraph_mode={mode} captures the secure step, which synchronises "
            "with the host: leave it out, or use PIECEWISE or NONE"
        )


def clashes(codec: type[FeatureCodec], architecture: Architecture) -> list[Trait]:
    """What of an architecture would see how a codec encodes scores, in a fixed order."""
    seeing = (Trait.SINKS, Trait.SOFT_CAPS) if codec.shifts_scores else ()
    return [trait for trait in seeing if trait in architecture.traits]


def _whole_graphs(vllm_config: "VllmConfig") -> str:
    """The mode that captures only whole steps in CUDA graphs; empty if vLLM uses none.

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

    vLLM turns `auto` into fp8 while it builds layers whose weights bring scales for it
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


def _cache_obstacles(cache_dtype: str, plan: EncodingPlan) -> Iterator[str]:
    """Why encoded keys and values would be rounded differently from plain ones."""
    if cache_dtype in _SCALED_CACHES and not plan.codec.moves_only:
        yield (
            f"kv_cache_dtype={cache_dtype!r} clips at scales made for K and V as they "
            f"are, and {CODEC}={plan.codec.name!r} stretches them: use auto (bfloat16 or "
            "float16 if the weights bring such scales), or the permutation codec"
        )
    if cache_dtype not in _PLAIN_CACHES + _SCALED_CACHES:
        yield (
            f"kv_cache_dtype={cache_dtype!r} may round groups of features, which are "
            "permuted: use auto or an fp8 type"
        )


def _shifted(plan: EncodingPlan, what: str) -> str:
    return (
        f"{what}, and {CODEC}={plan.codec.name!r} shifts the scores of a query, which "
        "softmax alone does not see: use the permutation codec"
    )


def require_attention(attn: Any, plan: EncodingPlan) -> None:
    """Refuse what an encoded layer's attention, as vLLM built it, turned out to do.

    `attn` is vLLM's Attention.
    """
    refuse(plan.config, _attention_obstacles(attn, plan))


def _attention_obstacles(attn: Any, plan: EncodingPlan) -> Iterator[str]:
    if attn.attn_type != "decoder":
        yield (
            f"attention of type {attn.attn_type!r} is not encoded: use a model that "
            f"attends to earlier tokens only, or unset {ENC_LAYERS}"
        )
    if attn.kv_sharing_target_layer_name is not None:
        yield (
            f"a layer reads the cache of {attn.kv_sharing_target_layer_name}, which has "
            "another key: use a model whose layers have their own caches"
        )
    if plan.codec.shifts_scores and attn.has_sink:
        yield _shifted(plan, "this model has attention sinks")
    if plan.codec.shifts_scores and getattr(attn.impl, "logits_soft_cap", None):
        yield _shifted(plan, "this model has capped scores")
    yield from _cache_obstacles(attn.kv_cache_dtype, plan)
