"""Mixtral with encoded attention in chosen layers."""

from vllm.model_executor.models.mixtral import MixtralAttention, MixtralForCausalLM

from scx.models.attention import SCXAttention
from scx.models.base import SCXForCausalLM


class MixtralSCXAttention(SCXAttention, MixtralAttention):
    """MixtralAttention with the encoded forward pass."""


class MixtralSCXForCausalLM(SCXForCausalLM, MixtralForCausalLM):
    """MixtralForCausalLM whose layers in SCX_ENC_LAYERS run encoded."""

    attention_class = MixtralSCXAttention
