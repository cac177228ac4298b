"""OLMoE with encoded attention in chosen layers."""

import torch
from torch import nn
from vllm.model_executor.models.olmoe import OlmoeAttention, OlmoeForCausalLM

from scx.models.attention import SCXAttention
from scx.models.base import SCXForCausalLM


class OlmoeSCXAttention(SCXAttention, OlmoeAttention):
    """OlmoeAttention with the encoded forward pass."""

    @property
    def norms(self) -> tuple[nn.Module, ...]:
        return self.q_norm, self.k_norm

    def norm(self, q: torch.Tensor, k: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return self.q_norm(q), self.k_norm(k)


class OlmoeSCXForCausalLM(SCXForCausalLM, OlmoeForCausalLM):
    """OlmoeForCausalLM whose layers in SCX_ENC_LAYERS run encoded."""

    attention_class = OlmoeSCXAttention
