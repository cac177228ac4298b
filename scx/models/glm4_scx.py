"""GLM-4 with encoded attention in chosen layers."""

from vllm.model_executor.models.glm4 import Glm4Attention, Glm4ForCausalLM

from scx.models.attention import SCXAttention
from scx.models.base import SCXForCausalLM


class Glm4SCXAttention(SCXAttention, Glm4Attention):
    """Glm4Attention with the encoded forward pass."""


class Glm4SCXForCausalLM(SCXForCausalLM, Glm4ForCausalLM):
    """Glm4ForCausalLM whose layers in SCX_ENC_LAYERS run encoded."""

    attention_class = Glm4SCXAttention
