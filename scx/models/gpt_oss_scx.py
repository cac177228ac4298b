"""gpt-oss with encoded attention in chosen layers."""

import torch
from vllm.model_executor.models.gpt_oss import GptOssForCausalLM, OAIAttention

from scx.models.attention import SCXAttention
from scx.models.base import SCXForCausalLM


class GptOssSCXAttention(SCXAttention, OAIAttention):
    """OAIAttention with the encoded forward pass."""

    def forward(  # pyright: ignore[reportIncompatibleMethodOverride]
        self, hidden_states: torch.Tensor, positions: torch.Tensor
    ) -> torch.Tensor:
        """As SCXAttention, with the arguments in OAIAttention's order."""
        return super().forward(positions, hidden_states)


class GptOssSCXForCausalLM(SCXForCausalLM, GptOssForCausalLM):
    """GptOssForCausalLM whose layers in SCX_ENC_LAYERS run encoded."""

    attention_class = GptOssSCXAttention

    def _attention(self, index: int) -> OAIAttention:
        return self.model.layers[index].attn
