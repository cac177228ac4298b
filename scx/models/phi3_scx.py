"""Phi-3 with encoded attention in chosen layers."""

from vllm.model_executor.models.phi3 import Phi3ForCausalLM

from scx.models.base import SCXForCausalLM
from scx.models.llama_scx import LlamaSCXAttention


class Phi3SCXForCausalLM(SCXForCausalLM, Phi3ForCausalLM):
    """Phi3ForCausalLM whose layers in SCX_ENC_LAYERS run encoded."""

    attention_class = LlamaSCXAttention
