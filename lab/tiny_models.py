"""Tiny random models: the shapes that the embedded model does not have."""

import json
import re
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
    """A random model with spread-out logits, seeded; Qwen2 with non-zero biases."""
    import torch
    import transformers

    kind = re.sub("(ForCausalLM|ForSequenceClassification|Model)$", "", architecture)
    config_class = getattr(transformers, f"{kind}Config")
    torch.manual_seed(0)
    model = getattr(transformers, architecture)(
        config_class(**(SHAPE | {"initializer_range": 0.2} | config))
    )
    for name, parameter in model.named_parameters():
        if name.endswith("_proj.bias"):
            torch.nn.init.normal_(parameter, std=0.5)
    model.save_pretrained(folder)
    return folder


def save_config(folder: Path, architecture: str, model_type: str, **config: Any) -> Path:
    """Only a config.json: enough for everything that happens before weights load."""
    folder.mkdir(parents=True)
    text = {"architectures": [architecture], "model_type": model_type} | SHAPE | config
    (folder / "config.json").write_text(json.dumps(text))
    return folder
