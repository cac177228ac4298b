"""Granite with encoded attention in chosen layers."""

from vllm.model_executor.models.granite import GraniteAttention, GraniteForCausalLM

from scx.models.attention import SCXAttention
from scx.models.base import SCXForCausalLM


class GraniteSCXAttention(SCXAttention, GraniteAttention):
    """GraniteAttention with the encoded forward pass."""

    @property
    def turns(self) -> bool:
        return hasattr(self, "rotary_emb")


class GraniteSCXForCausalLM(SCXForCausalLM, GraniteForCausalLM):
    """GraniteForCausalLM whose layers in SCX_ENC_LAYERS run encoded."""

    attention_class = GraniteSCXAttention
