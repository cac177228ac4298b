"""Mistral with encoded attention in chosen layers."""

from vllm.model_executor.models.mistral import MistralAttention, MistralForCausalLM

from scx.models.attention import SCXAttention
from scx.models.base import SCXForCausalLM


class MistralSCXAttention(SCXAttention, MistralAttention):
    """MistralAttention with the encoded forward pass."""


class MistralSCXForCausalLM(SCXForCausalLM, MistralForCausalLM):
    """MistralForCausalLM whose layers in SCX_ENC_LAYERS run encoded."""

    attention_class = MistralSCXAttention
