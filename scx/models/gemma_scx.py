"""Gemma with encoded attention in chosen layers."""

from vllm.model_executor.models.gemma import GemmaAttention, GemmaForCausalLM

from scx.models.attention import SCXAttention
from scx.models.base import SCXForCausalLM


class GemmaSCXAttention(SCXAttention, GemmaAttention):
    """GemmaAttention with the encoded forward pass."""


class GemmaSCXForCausalLM(SCXForCausalLM, GemmaForCausalLM):
    """GemmaForCausalLM whose layers in SCX_ENC_LAYERS run encoded."""

    attention_class = GemmaSCXAttention
