"""ERNIE 4.5, the models with experts, with encoded attention in chosen layers."""

from vllm.model_executor.models.ernie45_moe import (
    Ernie4_5_MoeAttention,
    Ernie4_5_MoeForCausalLM,
)

from scx.models.attention import SCXAttention
from scx.models.base import SCXForCausalLM


class Ernie4_5_MoeSCXAttention(SCXAttention, Ernie4_5_MoeAttention):
    """Ernie4_5_MoeAttention with the encoded forward pass."""


class Ernie4_5_MoeSCXForCausalLM(SCXForCausalLM, Ernie4_5_MoeForCausalLM):
    """Ernie4_5_MoeForCausalLM whose layers in SCX_ENC_LAYERS run encoded."""

    attention_class = Ernie4_5_MoeSCXAttention
