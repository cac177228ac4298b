"""Run attention in vLLM encoded: check a machine, estimate the cost, measure what leaks.

scx check [--model PATH]                  would this machine run encoded?
scx estimate --model PATH --layers 0,27   what would it cost on a GPU?
scx audit --model PATH --layers 0,27      what could the accelerator recover?
scx demo-model                            make a small model, and print its folder
"""

import argparse
import importlib
import sys
from pathlib import Path
from typing import get_args

from scx.commands.arguments import (
    codec,
    cores,
    file,
    gigabytes,
    layers,
    microseconds,
    model,
)
from scx.commands.demo_model import Architecture
from scx.errors import SCXError
from scx.kernels.machine import H100


def main(arguments: list[str] | None = None) -> int:
    """Run a command: 0 if all is well, 1 if not; exits with 2 for wrong arguments."""
    options = _parser().parse_args(arguments)
    # Only now, as some commands load torch and vLLM.
    command = importlib.import_module(f"scx.commands.{options.command.replace('-', '_')}")
    try:
        return 0 if command.run(options) else 1
    except SCXError as error:
        print(f"scx {options.command}: {error}", file=sys.stderr)
        return 1


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="scx",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    commands = parser.add_subparsers(dest="command", required=True)

    check = commands.add_parser(
        "check", help="check that this machine can run encoded, in about a minute"
    )
    check.add_argument(
        "--model", type=model, help="folder or hub name of the model to be served"
    )

    estimate = commands.add_parser("estimate", help="estimate what encoding would cost")
    estimate.add_argument(
        "--model", type=Path, required=True, help="local folder with a config.json"
    )
    estimate.add_argument(
        "--layers", type=layers, required=True, help="as in SCX_ENC_LAYERS"
    )
    estimate.add_argument(
        "--tensor-parallel-size", type=int, default=1, help="ranks (default: 1)"
    )
    estimate.add_argument(
        "--cores", type=cores, default=16, help="of the host (default: 16)"
    )
    for option, unit, value, text in (
        ("--bus", gigabytes, H100.bus_bytes_per_second, "GB/s in each direction"),
        ("--core", gigabytes, H100.core_bytes_per_second, "GB/s that a worker encodes"),
        ("--hop", microseconds, H100.hop_seconds, "microseconds per empty trip"),
        ("--flag", microseconds, H100.flag_seconds, "microseconds per chunk of rows"),
    ):
        estimate.add_argument(
            option, type=unit, default=value, help=f"{text} (default: an H100's)"
        )

    audit = commands.add_parser("audit", help="measure what the accelerator can recover")
    audit.add_argument(
        "--model", type=model, required=True, help="folder or hub name of a model"
    )
    audit.add_argument(
        "--layers", type=layers, default="0", help="as in SCX_ENC_LAYERS (default: 0)"
    )
    audit.add_argument("--codec", type=codec, help="overrides SCX_CODEC")
    audit.add_argument("--prompts", type=file, help="file with one prompt per line")
    audit.add_argument(
        "--adversary",
        choices=["A1", "A2", "A3", "all"],
        default="all",
        help="which adversary of SECURITY.md attacks (default: all)",
    )
    audit.add_argument(
        "--out", type=Path, default=Path("audit"), help="folder (default: audit)"
    )
    audit.add_argument(
        "--budget",
        type=float,
        default=240.0,
        help="seconds of attacks per layer, controls included (default: 240); an attack "
        "that has begun may take longer, and the engine's own time comes on top",
    )
    audit.add_argument("--seed", type=int, default=0, help="seed of the controls")
    audit.add_argument("--dtype", default="auto", help="as in vLLM (default: auto)")

    demo_model = commands.add_parser(
        "demo-model", help="make a small model without a hub, and print its folder"
    )
    demo_model.add_argument(
        "architecture", nargs="?", default="qwen2", choices=get_args(Architecture)
    )
    return parser


if __name__ == "__main__":
    sys.exit(main())
