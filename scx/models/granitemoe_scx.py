"""Granite-MoE with encoded attention in chosen layers."""

from vllm.model_executor.models.granitemoe import (
    GraniteMoeAttention,
    GraniteMoeForCausalLM,
)

from scx.models.attention import SCXAttention
from scx.models.base import SCXForCausalLM


class GraniteMoeSCXAttention(SCXAttention, GraniteMoeAttention):
    """GraniteMoeAttention with the encoded forward pass."""

    @property
    def turns(self) -> bool:
        return hasattr(self, "rotary_emb")


class GraniteMoeSCXForCausalLM(SCXForCausalLM, GraniteMoeForCausalLM):
    """GraniteMoeForCausalLM whose layers in SCX_ENC_LAYERS run encoded."""

    attention_class = GraniteMoeSCXAttention
