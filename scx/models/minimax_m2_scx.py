"""MiniMax-M2 with encoded attention in chosen layers."""

import torch
from vllm.model_executor.models.minimax_m2 import MiniMaxM2Attention, MiniMaxM2ForCausalLM

from scx.models.attention import SCXNormedAttention
from scx.models.base import SCXForCausalLM


class MiniMaxM2SCXAttention(SCXNormedAttention, MiniMaxM2Attention):
    """MiniMaxM2Attention with the encoded forward pass."""

    def norm(self, q: torch.Tensor, k: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return self.q_norm.forward_qk(self.q_norm, self.k_norm, q, k)


class MiniMaxM2SCXForCausalLM(SCXForCausalLM, MiniMaxM2ForCausalLM):
    """MiniMaxM2ForCausalLM whose layers in SCX_ENC_LAYERS run encoded."""

    attention_class = MiniMaxM2SCXAttention
