"""Gemma 3, the text models, with encoded attention in chosen layers."""

from torch import nn
from vllm.model_executor.models.gemma3 import Gemma3Attention, Gemma3ForCausalLM

from scx.models.attention import SCXAttention
from scx.models.base import SCXForCausalLM


class Gemma3SCXAttention(SCXAttention, Gemma3Attention):
    """Gemma3Attention with the encoded forward pass."""

    @property
    def norms(self) -> tuple[nn.Module, ...]:
        return self.q_norm, self.k_norm


class Gemma3SCXForCausalLM(SCXForCausalLM, Gemma3ForCausalLM):
    """Gemma3ForCausalLM whose layers in SCX_ENC_LAYERS run encoded."""

    attention_class = Gemma3SCXAttention
