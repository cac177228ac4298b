"""Gemma 2 with encoded attention in chosen layers."""

from vllm.model_executor.models.gemma2 import Gemma2Attention, Gemma2ForCausalLM

from scx.models.attention import SCXAttention
from scx.models.base import SCXForCausalLM


class Gemma2SCXAttention(SCXAttention, Gemma2Attention):
    """Gemma2Attention with the encoded forward pass."""


class Gemma2SCXForCausalLM(SCXForCausalLM, Gemma2ForCausalLM):
    """Gemma2ForCausalLM whose layers in SCX_ENC_LAYERS run encoded."""

    attention_class = Gemma2SCXAttention
