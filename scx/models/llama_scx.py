"""Llama with encoded attention in chosen layers."""

from vllm.model_executor.models.llama import LlamaAttention, LlamaForCausalLM

from scx.models.attention import SCXAttention
from scx.models.base import SCXForCausalLM


class LlamaSCXAttention(SCXAttention, LlamaAttention):
    """LlamaAttention with the encoded forward pass."""


class LlamaSCXForCausalLM(SCXForCausalLM, LlamaForCausalLM):
    """LlamaForCausalLM whose layers in SCX_ENC_LAYERS run encoded."""

    attention_class = LlamaSCXAttention
