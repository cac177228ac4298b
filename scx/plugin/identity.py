"""What tells one model from another, so that one key file gives each its own keys."""

import hashlib
import json
import os
import re
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

from huggingface_hub import try_to_load_from_cache
from huggingface_hub.errors import HFValidationError

# With the weights, these determine keys and values. Only these names are read: the rest
# of the configuration holds paths, versions and defaults that others do not share.
_FACTS = (
    "model_type",
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "hidden_act",
    "rms_norm_eps",
    "rope_parameters",
    "max_position_embeddings",
    "sliding_window",
    "layer_types",
    "max_window_layers",
)
# The first kind that a folder has, as vLLM prefers them.
_WEIGHTS = ("*.safetensors", "*.bin", "*.pt", "*.gguf")
_WINDOWS, _WINDOW_BYTES = 128, 1 << 16


def identity_of(model_config: Any) -> str:
    """32 hexadecimal digits that name a model and may be shown.

    They are a digest of what determines K and V: the shape and the positions as vLLM
    will run them, overrides included, and the weights. Weights from a snapshot of the
    Hugging Face hub are named by its commit, and weights in any other folder by a
    sample of their files, whatever the folder's path. So all ranks, replicas and
    copies of a folder agree; fine-tunes of one base differ.

    The sample is the name, the size and 128 windows of 64 KiB of each file, so all of it
    up to 8 MiB. A difference that spans a hundredth of a file is seen; a smaller one
    may be missed. An object store is known by its address, and a folder without
    weights by the shape alone.

    `model_config` is a vllm.config.ModelConfig.
    """
    text_config = model_config.hf_text_config
    facts = {name: getattr(text_config, name, None) for name in _FACTS}
    rope = facts["rope_parameters"] or {}
    if rope.get("rope_type") == "longrope":
        # vLLM has two tables for longrope (phi3_long_rope_scaled_rope.py).
        original = rope.get("original_max_position_embeddings", 0)
        facts["extended"] = model_config.max_model_len > original
    facts["weights"] = _weights(str(model_config.model), model_config.revision)
    canonical = json.dumps(facts, sort_keys=True, default=str)
    return hashlib.sha256(canonical.encode()).hexdigest()[:32]


def _weights(model: str, revision: str | None) -> str:
    path = Path(model)
    if not path.exists():
        cached = None
        with suppress(HFValidationError):
            cached = try_to_load_from_cache(model, "config.json", revision=revision)
        if not isinstance(cached, str):
            return f"{model} {revision}"
        path = Path(cached).parent
    path = path.resolve()
    if path.parent.name == "snapshots" and re.fullmatch("[0-9a-f]{40}", path.name):
        return path.name
    digest = hashlib.sha256()
    for file in _weight_files(path):
        size = file.stat().st_size
        digest.update(f"{file.name}\0{size}\0".encode())
        with file.open("rb", buffering=0) as weights:
            last = max(0, size - _WINDOW_BYTES)
            for offset in sorted({last * i // (_WINDOWS - 1) for i in range(_WINDOWS)}):
                digest.update(os.pread(weights.fileno(), _WINDOW_BYTES, offset))
    return digest.hexdigest()


def _weight_files(path: Path) -> list[Path]:
    if path.is_file():
        return [path]
    kinds: Iterator[list[Path]] = (
        sorted(file for file in path.glob(kind) if _is_weights(file)) for kind in _WEIGHTS
    )
    return next((files for files in kinds if files), [])


def _is_weights(file: Path) -> bool:
    """Whether it is of the model itself; an adapter may lie beside it."""
    return file.is_file() and not file.name.startswith("adapter_")
