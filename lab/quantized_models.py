"""Saved models in the formats of quantised weights, rounded to the nearest level.

Each is what its common tool writes for linear layers, by the loaders of vLLM
(vllm/model_executor/layers/quantization). The embedding and lm_head stay as they are.
"""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

GROUP = 64
"""Weights along the inputs that share a scale, in four-bit formats."""

_AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)
"""Which of eight columns each nibble of an AWQ word holds, from the lowest."""


def save_quantized(model: Path, folder: Path, method: str) -> Path:
    """A copy of a saved model in the format that `FORMATS` names."""
    config, convert = FORMATS[method]
    shutil.copytree(model, folder)
    tensors = load_file(folder / "model.safetensors")
    for name in [name for name in tensors if name.endswith("_proj.weight")]:
        for part, tensor in convert(tensors.pop(name)).items():
            tensors[name.removesuffix("weight") + part] = tensor.contiguous()
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    text = json.loads((folder / "config.json").read_text())
    text["quantization_config"] = config
    (folder / "config.json").write_text(json.dumps(text))
    return folder


def _int8(weight: torch.Tensor) -> dict[str, torch.Tensor]:
    """A scale for each output; activations get one for each token as they come."""
    scale = weight.abs().amax(1, keepdim=True) / 127
    levels = (weight / scale).round().to(torch.int8)
    return {"weight": levels, "weight_scale": scale}


def _fp8(weight: torch.Tensor) -> dict[str, torch.Tensor]:
    """One scale; activations get one for the whole batch as they come."""
    scale = weight.abs().max() / torch.finfo(torch.float8_e4m3fn).max
    return {"weight": (weight / scale).to(torch.float8_e4m3fn), "weight_scale": scale}


def _four_bits(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Levels 0 to 15 about 8, int32 (inputs, outputs), and scales (groups, outputs)."""
    groups = weight.t().unflatten(0, (-1, GROUP))
    scales = groups.abs().amax(1) / 7
    levels = (groups / scales[:, None]).round().int() + 8
    return levels.flatten(0, 1), scales.half()


def _pack(levels: torch.Tensor) -> torch.Tensor:
    """Words of the eight levels in the last dimension, the first one lowest."""
    words = (levels.long() << torch.arange(0, 32, 4)).sum(-1)
    return words.to(torch.uint32).view(torch.int32)


def _gptq(weight: torch.Tensor) -> dict[str, torch.Tensor]:
    levels, scales = _four_bits(weight)
    inputs, outputs = levels.shape
    return {
        "qweight": _pack(levels.view(-1, 8, outputs).transpose(1, 2)),
        # The format holds one less than the level of zero.
        "qzeros": _pack(torch.full((len(scales), outputs // 8, 8), 7)),
        "scales": scales,
        "g_idx": torch.arange(inputs, dtype=torch.int32) // GROUP,
    }


def _awq(weight: torch.Tensor) -> dict[str, torch.Tensor]:
    levels, scales = _four_bits(weight)
    inputs, outputs = levels.shape
    return {
        "qweight": _pack(levels.view(inputs, -1, 8)[..., list(_AWQ_ORDER)]),
        "qzeros": _pack(torch.full((len(scales), outputs // 8, 8), 8)),
        "scales": scales,
    }


_INT8_LEVELS = {"num_bits": 8, "type": "int", "symmetric": True}

FORMATS: dict[str, tuple[dict[str, Any], Callable]] = {
    "int8": (
        {
            "quant_method": "compressed-tensors",
            "format": "int-quantized",
            "ignore": ["lm_head"],
            "config_groups": {
                "group_0": {
                    "targets": ["Linear"],
                    "weights": _INT8_LEVELS | {"strategy": "channel"},
                    "input_activations": _INT8_LEVELS
                    | {"strategy": "token", "dynamic": True},
                }
            },
        },
        _int8,
    ),
    "fp8": ({"quant_method": "fp8", "activation_scheme": "dynamic"}, _fp8),
    "gptq": (
        {
            "quant_method": "gptq",
            "bits": 4,
            "group_size": GROUP,
            "desc_act": False,
            "sym": True,
        },
        _gptq,
    ),
    "awq": (
        {"quant_method": "awq", "bits": 4, "group_size": GROUP, "zero_point": True},
        _awq,
    ),
}
