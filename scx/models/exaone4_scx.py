"""EXAONE 4 with encoded attention in chosen layers."""

from vllm.model_executor.models.exaone4 import Exaone4Attention, Exaone4ForCausalLM

from scx.models.attention import SCXNormedAttention
from scx.models.base import SCXForCausalLM


class Exaone4SCXAttention(SCXNormedAttention, Exaone4Attention):
    """Exaone4Attention with the encoded forward pass."""

    @property
    def turns(self) -> bool:
        return bool(self.sliding_window or self.apply_rope_all_layers)


class Exaone4SCXForCausalLM(SCXForCausalLM, Exaone4ForCausalLM):
    """Exaone4ForCausalLM whose layers in SCX_ENC_LAYERS run encoded."""

    attention_class = Exaone4SCXAttention
