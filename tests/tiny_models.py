"""Tiny random models: the shapes that the embedded model does not have."""

import json
import shutil
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

    kind = architecture.removesuffix("ForCausalLM")
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


def save_int8(model: Path, folder: Path) -> Path:
    """A copy of a saved model in compressed-tensors' W8A8 format.

    Weights of the layers' projections have a scale for each output channel and are
    rounded to the nearest level; activations get a scale for each token as they come.
    """
    import torch
    from safetensors.torch import load_file, save_file

    shutil.copytree(model, folder)
    tensors = load_file(folder / "model.safetensors")
    for name in [name for name in tensors if name.endswith("_proj.weight")]:
        scale = tensors[name].abs().amax(1, keepdim=True) / 127
        tensors[name] = (tensors[name] / scale).round().to(torch.int8)
        tensors[f"{name}_scale"] = scale
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    levels = {"num_bits": 8, "type": "int", "symmetric": True}
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] = {
        "quant_method": "compressed-tensors",
        "format": "int-quantized",
        "ignore": ["lm_head"],
        "config_groups": {
            "group_0": {
                "targets": ["Linear"],
                "weights": levels | {"strategy": "channel"},
                "input_activations": levels | {"strategy": "token", "dynamic": True},
            }
        },
    }
    (folder / "config.json").write_text(json.dumps(config))
    return folder
