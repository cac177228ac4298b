"""Command R and its successors with encoded attention in chosen layers."""

import torch
from torch import nn
from vllm.model_executor.models.commandr import CohereAttention, CohereForCausalLM

from scx.models.attention import SCXAttention
from scx.models.base import SCXForCausalLM


class CohereSCXAttention(SCXAttention, CohereAttention):
    """CohereAttention with the encoded forward pass."""

    @property
    def norms(self) -> tuple[nn.Module, ...]:
        return (self.q_norm, self.k_norm) if self.use_qk_norm else ()

    @property
    def turns(self) -> bool:
        return bool(self.v1 or self.sliding_window)

    def norm(self, q: torch.Tensor, k: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return self._apply_qk_norm(q, k)


class CohereSCXForCausalLM(SCXForCausalLM, CohereForCausalLM):
    """CohereForCausalLM whose layers in SCX_ENC_LAYERS run encoded."""

    attention_class = CohereSCXAttention
