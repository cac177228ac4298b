"""Qwen3-MoE with encoded attention in chosen layers."""

from torch import nn
from vllm.model_executor.models.qwen3_moe import Qwen3MoeAttention, Qwen3MoeForCausalLM

from scx.models.attention import SCXAttention
from scx.models.base import SCXForCausalLM


class Qwen3MoeSCXAttention(SCXAttention, Qwen3MoeAttention):
    """Qwen3MoeAttention with the encoded forward pass."""

    @property
    def norms(self) -> tuple[nn.Module, ...]:
        return self.q_norm, self.k_norm


class Qwen3MoeSCXForCausalLM(SCXForCausalLM, Qwen3MoeForCausalLM):
    """Qwen3MoeForCausalLM whose layers in SCX_ENC_LAYERS run encoded."""

    attention_class = Qwen3MoeSCXAttention
