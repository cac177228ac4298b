"""Qwen3 with encoded attention in chosen layers."""

from torch import nn
from vllm.model_executor.models.qwen3 import Qwen3Attention, Qwen3ForCausalLM

from scx.models.attention import SCXAttention
from scx.models.base import SCXForCausalLM


class Qwen3SCXAttention(SCXAttention, Qwen3Attention):
    """Qwen3Attention with the encoded forward pass."""

    @property
    def norms(self) -> tuple[nn.Module, ...]:
        return self.q_norm, self.k_norm


class Qwen3SCXForCausalLM(SCXForCausalLM, Qwen3ForCausalLM):
    """Qwen3ForCausalLM whose layers in SCX_ENC_LAYERS run encoded."""

    attention_class = Qwen3SCXAttention
