"""Qwen2 with encoded attention in chosen layers."""

from torch import nn
from vllm.model_executor.models.qwen2 import Qwen2Attention, Qwen2ForCausalLM

from scx.models.attention import SCXAttention
from scx.models.base import SCXForCausalLM


class Qwen2SCXAttention(SCXAttention, Qwen2Attention):
    """Qwen2Attention with the encoded forward pass."""

    @property
    def norms(self) -> tuple[nn.Module, ...]:
        return (self.q_norm, self.k_norm) if self.qk_norm else ()


class Qwen2SCXForCausalLM(SCXForCausalLM, Qwen2ForCausalLM):
    """Qwen2ForCausalLM whose layers in SCX_ENC_LAYERS run encoded."""

    attention_class = Qwen2SCXAttention
