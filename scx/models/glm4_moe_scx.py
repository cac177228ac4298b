"""GLM-4-MoE with encoded attention in chosen layers."""

from torch import nn
from vllm.model_executor.models.glm4_moe import Glm4MoeAttention, Glm4MoeForCausalLM

from scx.models.attention import SCXAttention
from scx.models.base import SCXForCausalLM


class Glm4MoeSCXAttention(SCXAttention, Glm4MoeAttention):
    """Glm4MoeAttention with the encoded forward pass."""

    @property
    def norms(self) -> tuple[nn.Module, ...]:
        return (self.q_norm, self.k_norm) if self.use_qk_norm else ()


class Glm4MoeSCXForCausalLM(SCXForCausalLM, Glm4MoeForCausalLM):
    """Glm4MoeForCausalLM whose layers in SCX_ENC_LAYERS run encoded."""

    attention_class = Glm4MoeSCXAttention
