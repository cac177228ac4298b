"""Throughput of one engine, plain or encoded: what the scripts beside it share.

It prints a log for people, whose last line is a record in JSON. Such logs, of the
same machine and setting, are compared by `python -m benchmark_throughput.overhead`.
"""

import argparse
import json
import sys
import time
from collections.abc import Callable
from dataclasses import asdict
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from benchmark_throughput.harness import (
    Plan,
    Run,
    built_engine,
    make_record,
    random_prompts,
    timed_run,
)
from benchmark_throughput.options import (
    add_engine_options,
    make_setting,
    read_num_hidden_layers,
)
from benchmark_throughput.records import (
    CODEC,
    NATIVE,
    Arm,
    Record,
    Workload,
    parse_arm,
)
from lab.cli import Parser, UsageError, natural, positive
from lab.processes import ArmFailed, in_own_session, interruptible
from scx.commands.demo_model import Architecture, embedded_model
from scx.errors import SCXError

DATA = Path(__file__).resolve().parent.parent / "data"

# The length that the embedded default and two cores can do.
EMBEDDED = {"input_len": 1024, "output_len": 64, "max_model_len": 2048}
DEFAULTS = {"input_len": 32768, "output_len": 512, "max_model_len": 38000}


def parser(description: str, ranks: int) -> Parser:
    parser = Parser(
        description=description,
        epilog="Without --model it is SmolLM2-135M, embedded, with shorter prompts.",
    )
    parser.add_argument("--model", type=Path, metavar="PATH", help="a model's folder")
    parser.add_argument(
        "--scx_enc_layers",
        "--scx-enc-layers",
        default="",
        help="as in SCX_ENC_LAYERS; empty is plain (the default)",
    )
    parser.add_argument("--scx_secure_device", "--scx-secure-device", default="cpu")
    parser.add_argument("--scx_codec", "--scx-codec", default=CODEC)
    for name, value in DEFAULTS.items():
        option = f"--{name.replace('_', '-')}"
        parser.add_argument(option, type=positive, help=f"tokens (default: {value})")
    parser.add_argument("--num-prompts", type=positive, default=1, help="(default: 1)")
    parser.add_argument(
        "--repeat", type=positive, default=3, help="timed runs (default: 3)"
    )
    parser.add_argument("--warmups", type=natural, default=1, help="(default: 1)")
    parser.add_argument("--seed", type=natural, default=0)
    engine = parser.add_argument_group("given to vLLM")
    add_engine_options(engine)
    engine.add_argument(
        "--tensor-parallel-size", type=positive, default=ranks, help=f"(default: {ranks})"
    )
    engine.add_argument("--gpu-memory-utilization", type=float, default=0.92)
    return parser


def arm_of(options: argparse.Namespace) -> Arm:
    """Raises UsageError."""
    if not options.scx_enc_layers:
        return NATIVE
    layers, device = options.scx_enc_layers, options.scx_secure_device
    return parse_arm(f"{layers}@{device}+{options.scx_codec}")


def make_plan(options: argparse.Namespace, arm: Arm, embedded: Architecture) -> Plan:
    """All that can be known before an engine starts. Raises UsageError."""
    if options.model is None:
        options.model = embedded_model(embedded)
        defaults = EMBEDDED
        print(f"no --model: {options.model.name}, embedded, with {EMBEDDED}", flush=True)
    else:
        defaults = DEFAULTS
    for name, value in defaults.items():
        if getattr(options, name) is None:
            setattr(options, name, value)
    needed = options.input_len + options.output_len
    if needed > options.max_model_len:
        raise UsageError(
            f"--max-model-len {options.max_model_len} is less than --input-len "
            f"{options.input_len} and --output-len {options.output_len}"
        )
    num_hidden_layers = read_num_hidden_layers(options.model.resolve())
    setting = make_setting(options, [arm], num_hidden_layers, in_process=False)
    workload = Workload(
        "generate", options.num_prompts, options.input_len, options.output_len
    )
    now = f"{datetime.now(timezone.utc):%Y%m%dT%H%M%SZ}"
    return Plan(options.model.resolve(), [workload], options.repeat, setting, now, Path())


def prompt_maker(plan: Plan, vocabulary: int) -> tuple[Callable[[int], list[Any]], str]:
    """What makes the prompts of a run from its number, and where they come from.

    Of a model with a tokenizer, from data/; else random token ids.
    """
    (workload,) = plan.workloads
    if not (plan.model / "tokenizer_config.json").is_file():
        return (
            lambda number: random_prompts(
                workload, vocabulary, plan.setting.seed, number
            ),
            "random token ids, as the model has no tokenizer",
        )
    from transformers import AutoTokenizer

    from data.prompts import load_prompt

    tokenizer = AutoTokenizer.from_pretrained(plan.model)
    path = DATA / "prompt_32k.txt"

    def prompts(number: int) -> list[Any]:
        first = 1 + number * workload.prompts
        texts = [
            load_prompt(path, tokenizer, workload.input_tokens, first + index)
            for index in range(workload.prompts)
        ]
        return [{"prompt_token_ids": tokenizer.encode(text)} for text in texts]

    return prompts, path.name


def run(plan: Plan, arm: Arm) -> Record:
    """Build the engine, generate, and say so line by line."""
    (workload,) = plan.workloads
    with built_engine(arm, plan) as (llm, build_seconds):
        say(f"engine built in {build_seconds:.1f} s")
        vocabulary = llm.llm_engine.model_config.get_vocab_size()
        prompts, source = prompt_maker(plan, vocabulary)
        say(f"prompts: {workload.prompts} of {source}")
        runs: list[Run] = []
        for number in range(plan.setting.warmups + plan.repeats):
            done = timed_run(llm, arm, workload, prompts(number))
            warm = number >= plan.setting.warmups
            rate = workload.counted_tokens / done.seconds
            say(
                f"{'run' if warm else 'warm-up'} {number + 1}: {done.seconds:.3f} s, "
                f"{rate:,.1f} tokens/s, {workload.output_tokens * workload.prompts} new"
            )
            if warm:
                runs.append(done)
    return make_record(plan, arm, build_seconds, workload, runs)


def say(text: str) -> None:
    print(f"{time.strftime('%H:%M:%S')} {text}", flush=True)


def summary(record: Record) -> list[str]:
    versions = ", ".join(f"{k} {v}" for k, v in record.versions.items())
    speeds = (
        record.tokens_per_second,
        record.tokens_per_second_min,
        record.tokens_per_second_max,
    )
    lines = [
        f"{record.model} on {record.accelerator}, {record.cores} cores; {versions}",
        f"layers encoded: {record.layers or 'none'}, secure device {record.device}",
        f"codec: {record.codec if record.layers else 'none'}",
        "input and output: {:,.1f} tokens/s ({:,.1f} to {:,.1f})".format(*speeds),
    ]
    if record.ttft_seconds is not None:
        lines.append(f"time to first token: {record.ttft_seconds * 1e3:,.1f} ms")
    if record.tpot_seconds is not None:
        lines.append(f"time per later token: {record.tpot_seconds * 1e3:,.2f} ms")
    if record.crossed_bytes is not None:
        lines.append(
            f"crossed the secure device's border: {record.crossed_bytes:,} bytes"
        )
    if record.engine_args.get("load_format") == "dummy":
        lines.append("dummy weights: the speed is real, the text is not")
    return lines


def main(description: str, embedded: Architecture, ranks: int = 1) -> int:
    """Run one arm; the exit status is 0 where it finished."""
    cli = parser(description, ranks)
    options = cli.parse_args()
    try:
        arm = arm_of(options)
        with interruptible():
            record = in_own_session(run, make_plan(options, arm, embedded), arm)
    except (UsageError, SCXError) as error:
        cli.error(str(error))
    except ArmFailed as error:
        print(f"the run failed: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("interrupted: no record", file=sys.stderr)
        return 130
    print("\n".join(summary(record)))
    print(json.dumps(asdict(record)), flush=True)
    return 0
