"""Qwen3 with encoded attention in chosen layers."""

from vllm.model_executor.models.qwen3 import Qwen3Attention, Qwen3ForCausalLM

from scx.models.attention import SCXNormedAttention
from scx.models.base import SCXForCausalLM


class Qwen3SCXAttention(SCXNormedAttention, Qwen3Attention):
    """Qwen3Attention with the encoded forward pass."""


class Qwen3SCXForCausalLM(SCXForCausalLM, Qwen3ForCausalLM):
    """Qwen3ForCausalLM whose layers in SCX_ENC_LAYERS run encoded."""

    attention_class = Qwen3SCXAttention
