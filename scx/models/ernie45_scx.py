"""ERNIE 4.5, the dense models, with encoded attention in chosen layers."""

from vllm.model_executor.models.ernie45 import Ernie4_5ForCausalLM

from scx.models.base import SCXForCausalLM
from scx.models.llama_scx import LlamaSCXAttention


class Ernie4_5SCXForCausalLM(SCXForCausalLM, Ernie4_5ForCausalLM):
    """Ernie4_5ForCausalLM whose layers in SCX_ENC_LAYERS run encoded."""

    attention_class = LlamaSCXAttention
