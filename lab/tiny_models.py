"""Tiny random models: the shapes that the embedded model does not have."""

import json
from pathlib import Path
from typing import Any

VOCABULARY = 512

SHAPE = {
    "vocab_size": VOCABULARY,
    "hidden_size": 128,
    "intermediate_size": 256,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 1024,
    "tie_word_embeddings": False,
}

ROPE_VARIANTS: dict[str, dict[str, Any]] = {
    "default": {"rope_type": "default", "rope_theta": 1e4},
    "linear": {"rope_type": "linear", "rope_theta": 1e4, "factor": 2.0},
    "dynamic": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0},
    "yarn": {
        "rope_type": "yarn",
        "rope_theta": 1e4,
        "factor": 4.0,
        "original_max_position_embeddings": 256,
    },
    "llama3": {
        "rope_type": "llama3",
        "rope_theta": 5e5,
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 256,
    },
}

# Long enough that positions beyond the yarn and llama3 originals are used.
PROMPTS = [
    [(7 * i * i + 3 * i + s) % VOCABULARY for i in range(n)]
    for s, n in enumerate((1, 2, 5, 17, 40, 300))
]


def save(folder: Path, architecture: str, **config: Any) -> Path:
    """A random model with spread-out logits, seeded. Biases of projections are not zero,
    and the weights of norms of queries and keys differ by feature, as trained ones do."""
    import torch
    import transformers

    model_class = getattr(transformers, architecture)
    torch.manual_seed(0)
    made = model_class.config_class(**(SHAPE | {"initializer_range": 0.2} | config))
    model = model_class(made)
    for name, parameter in model.named_parameters():
        if name.endswith("_proj.bias"):
            torch.nn.init.normal_(parameter, std=0.5)
        elif name.endswith(("q_norm.weight", "k_norm.weight")):
            torch.nn.init.uniform_(parameter, 0.5, 1.5)
    model.save_pretrained(folder)
    return folder


def save_config(folder: Path, architecture: str, model_type: str, **config: Any) -> Path:
    """Only a config.json: enough for everything that happens before weights load."""
    folder.mkdir(parents=True)
    text = {"architectures": [architecture], "model_type": model_type} | SHAPE | config
    (folder / "config.json").write_text(json.dumps(text))
    return folder


_EXPERTS = {
    "moe_intermediate_size": 128,
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "norm_topk_prob": True,
}
# Every other layer slides.
_SLIDING = {
    "sliding_window": 64,
    "layer_types": ["sliding_attention", "full_attention"] * 2,
}
# Without a padding token: the embedding of one is zero, so its logits would tie.
_WHOLE = {"pad_token_id": None}

FAMILIES: dict[str, dict[str, Any]] = {
    "CohereForCausalLM": _WHOLE | {"logit_scale": 1.0, "use_qk_norm": True},
    "Cohere2ForCausalLM": _WHOLE | _SLIDING | {"logit_scale": 1.0},
    # Its rotation pairs neighbours.
    "Ernie4_5ForCausalLM": _WHOLE,
    "Ernie4_5_MoeForCausalLM": _WHOLE
    | {
        "moe_intermediate_size": 128,
        "moe_num_experts": 4,
        "moe_k": 2,
        "moe_num_shared_experts": 1,
        "moe_layer_start_index": 1,
    },
    "Exaone4ForCausalLM": _WHOLE | _SLIDING,
    "GemmaForCausalLM": _WHOLE | {"head_dim": 64, "tie_word_embeddings": True},
    "Gemma2ForCausalLM": _WHOLE
    | _SLIDING
    | {"head_dim": 64, "tie_word_embeddings": True},
    "Gemma3ForCausalLM": _WHOLE
    | _SLIDING
    | {"head_dim": 64, "tie_word_embeddings": True},
    "Glm4ForCausalLM": _WHOLE | {"head_dim": 64, "attention_bias": True},
    "Glm4MoeForCausalLM": _WHOLE
    | {
        "head_dim": 64,
        "attention_bias": True,
        "use_qk_norm": True,
        "moe_intermediate_size": 128,
        "n_routed_experts": 4,
        "num_experts_per_tok": 2,
        "first_k_dense_replace": 1,
    },
    "GptOssForCausalLM": _WHOLE
    | _SLIDING
    | {"head_dim": 64, "num_local_experts": 4, "num_experts_per_tok": 2},
    "GraniteForCausalLM": _WHOLE | {"attention_multiplier": 0.2},
    "GraniteMoeForCausalLM": _WHOLE
    | {
        "attention_multiplier": 0.2,
        "num_local_experts": 4,
        "num_experts_per_tok": 2,
    },
    "LlamaForCausalLM": {},
    "MiniMaxM2ForCausalLM": _WHOLE
    | {
        "head_dim": 64,
        "rotary_dim": 32,
        "num_local_experts": 4,
        "num_experts_per_tok": 2,
        "scoring_func": "softmax",
        "use_routing_bias": True,
    },
    "MistralForCausalLM": {"sliding_window": 64},
    "MixtralForCausalLM": _WHOLE | {"num_local_experts": 4, "num_experts_per_tok": 2},
    "OlmoeForCausalLM": _WHOLE | {"num_experts": 4, "num_experts_per_tok": 2},
    "Phi3ForCausalLM": _WHOLE | {"num_key_value_heads": 4},
    "Qwen2ForCausalLM": {},
    "Qwen2MoeForCausalLM": _WHOLE | _EXPERTS | {"shared_expert_intermediate_size": 128},
    "Qwen3ForCausalLM": {
        "head_dim": 64,
        "attention_bias": True,
        "num_key_value_heads": 1,
    },
    "Qwen3MoeForCausalLM": _WHOLE | _EXPERTS | {"head_dim": 64},
}
"""A tiny model of each architecture that is encoded, as the arguments of `save`."""
