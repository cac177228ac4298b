"""Gemma 3, the text models, with encoded attention in chosen layers."""

from vllm.model_executor.models.gemma3 import Gemma3Attention, Gemma3ForCausalLM

from scx.models.attention import SCXNormedAttention
from scx.models.base import SCXForCausalLM


class Gemma3SCXAttention(SCXNormedAttention, Gemma3Attention):
    """Gemma3Attention with the encoded forward pass."""


class Gemma3SCXForCausalLM(SCXForCausalLM, Gemma3ForCausalLM):
    """Gemma3ForCausalLM whose layers in SCX_ENC_LAYERS run encoded."""

    attention_class = Gemma3SCXAttention
