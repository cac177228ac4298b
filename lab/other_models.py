"""Model classes of somebody else's, as plugins register them."""

from vllm.model_executor.models.llama import LlamaForCausalLM


class BiasedLlama(LlamaForCausalLM):
    """Llama that likes one token, so not the model of its stock class."""

    def compute_logits(self, *args, **kwargs):
        logits = super().compute_logits(*args, **kwargs)
        logits[..., 7] += 1e4
        return logits
