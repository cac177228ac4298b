"""Qwen3-MoE with encoded attention in chosen layers."""

from vllm.model_executor.models.qwen3_moe import Qwen3MoeAttention, Qwen3MoeForCausalLM

from scx.models.attention import SCXNormedAttention
from scx.models.base import SCXForCausalLM


class Qwen3MoeSCXAttention(SCXNormedAttention, Qwen3MoeAttention):
    """Qwen3MoeAttention with the encoded forward pass."""


class Qwen3MoeSCXForCausalLM(SCXForCausalLM, Qwen3MoeForCausalLM):
    """Qwen3MoeForCausalLM whose layers in SCX_ENC_LAYERS run encoded."""

    attention_class = Qwen3MoeSCXAttention
