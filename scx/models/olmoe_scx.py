"""OLMoE with encoded attention in chosen layers."""

import torch
from vllm.model_executor.models.olmoe import OlmoeAttention, OlmoeForCausalLM

from scx.models.attention import SCXNormedAttention
from scx.models.base import SCXForCausalLM


class OlmoeSCXAttention(SCXNormedAttention, OlmoeAttention):
    """OlmoeAttention with the encoded forward pass."""

    def norm(self, q: torch.Tensor, k: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return self.q_norm(q), self.k_norm(k)


class OlmoeSCXForCausalLM(SCXForCausalLM, OlmoeForCausalLM):
    """OlmoeForCausalLM whose layers in SCX_ENC_LAYERS run encoded."""

    attention_class = OlmoeSCXAttention
