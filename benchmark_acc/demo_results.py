"""The results in this folder: the embedded models on the task that needs no hub.

    python -m benchmark_acc.demo_results [--out benchmark_acc/results]

Llama and Qwen2, float32 and bfloat16, plain, with three choices of encoded layers, and
with all of them under the affine codec. Arms of the same setting that are there
already stay as they are.
"""

import sys
from dataclasses import asdict, replace
from pathlib import Path
from typing import get_args

from benchmark_acc.evaluation import run_arm
from benchmark_acc.logs import FILE, read_arm
from benchmark_acc.run_eval import arm_name, exit_status, make_plan, say
from lab.cli import Parser
from scx.commands.demo_model import Architecture, embedded_model
from scx.keys import DEFAULT_CODEC

TASK = "pydoc"
ARMS = (
    ("", DEFAULT_CODEC),
    ("0", DEFAULT_CODEC),
    ("0,29", DEFAULT_CODEC),
    ("all", DEFAULT_CODEC),
    ("all", "affine"),
)
"""Encoded layers and codec."""
TYPES = ("float32", "bfloat16")
SETTING = {
    "tensor_parallel_size": 1,
    "model_args": "enforce_eager=True,max_model_len=512",
    "limit": 40,
    "seed": 0,
}


def evaluate_all(out: Path) -> None:
    for dtype in TYPES:
        for architecture in get_args(Architecture):
            model = str(embedded_model(architecture))
            planned = make_plan(model, TASK, dtype=dtype, **SETTING)
            for layers, codec in ARMS:
                plan = replace(planned, codec=codec)
                name = arm_name(layers, plan)
                folder = out / dtype / TASK / plan.setting.model / name
                file = folder / FILE
                if not file.exists() or read_arm(file).setting != asdict(plan.setting):
                    run_arm(plan, layers, folder)
                say(f"{dtype}, {architecture}: arm {name} is in {folder}")


def main() -> int:
    parser = Parser(description=__doc__)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results")
    options = parser.parse_args()
    return exit_status(lambda: evaluate_all(options.out))


if __name__ == "__main__":
    sys.exit(main())
