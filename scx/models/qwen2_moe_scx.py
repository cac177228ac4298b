"""Qwen2-MoE with encoded attention in chosen layers."""

from vllm.model_executor.models.qwen2_moe import Qwen2MoeAttention, Qwen2MoeForCausalLM

from scx.models.attention import SCXAttention
from scx.models.base import SCXForCausalLM


class Qwen2MoeSCXAttention(SCXAttention, Qwen2MoeAttention):
    """Qwen2MoeAttention with the encoded forward pass."""


class Qwen2MoeSCXForCausalLM(SCXForCausalLM, Qwen2MoeForCausalLM):
    """Qwen2MoeForCausalLM whose layers in SCX_ENC_LAYERS run encoded."""

    attention_class = Qwen2MoeSCXAttention
