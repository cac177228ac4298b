"""Throughput with layers encoded, next to vLLM without encoding.

    python -m benchmark_throughput.compare --model PATH --arm 0,27 --arm all@cuda
    python -m benchmark_throughput.compare --report FILE.jsonl [--markdown] [--plot F.png]

The native arm always runs. Every arm keeps one engine in a process of its own
from beginning to end. In each round of a workload all arms run it in turn, on
the same prompts and one at a time, and speeds of the same round are compared:
so drift of the machine falls on all. Each finished workload appends one line
an arm to a file of records; the tables and plots are made from such files.
"""

import argparse
import contextlib
import importlib.util
import sys
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from benchmark_throughput.harness import (
    ArmFailed,
    Plan,
    ResidentArm,
    Run,
    make_record,
)
from benchmark_throughput.options import (
    add_engine_options,
    distinct,
    make_setting,
    read_num_hidden_layers,
)
from benchmark_throughput.ratios import CURVES, report
from benchmark_throughput.records import (
    NATIVE,
    WORKLOADS,
    Arm,
    Workload,
    append_record,
    parse_arm,
    parse_workload,
    read_records,
)
from lab.cli import Parser, UsageError, natural, positive
from lab.processes import interruptible

RESULTS = Path(__file__).parent / "results"
SPARE_TOKENS = 8


def parser() -> Parser:
    parser = Parser(prog="python -m benchmark_throughput.compare", description=__doc__)
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--model", type=Path, metavar="PATH", help="a model's folder")
    what.add_argument(
        "--report", type=Path, nargs="+", metavar="FILE", help="run nothing, show these"
    )
    parser.add_argument(
        "--arm",
        action="append",
        default=[],
        metavar="LAYERS[@DEVICE]",
        help="an encoded arm, such as 0,27 or all@cuda (default device cpu), or off: "
        "the plugin without layers, a second native run; repeatable",
    )
    parser.add_argument(
        "--workloads",
        default=",".join(WORKLOADS),
        metavar="LIST",
        help="names and NAME=PROMPTSxINPUT+OUTPUT with commas between; of workloads "
        "called decode* output tokens count alone (default: %(default)s)",
    )
    parser.add_argument("--warmups", type=natural, default=2, help="runs (default: 2)")
    parser.add_argument(
        "--repeats", type=positive, default=5, help="timed rounds (default: 5)"
    )
    parser.add_argument(
        "--starts",
        type=positive,
        default=1,
        help="engines that are built at the same time (default: 1)",
    )
    parser.add_argument("--out", type=Path, metavar="FILE", help="records are appended")
    parser.add_argument("--markdown", action="store_true", help="tables in Markdown")
    parser.add_argument("--plot", type=Path, metavar="PNG", help="draw the ratios")
    parser.add_argument(
        "--curve",
        choices=CURVES,
        help="plot them over the number of encoded layers, input tokens or prompts",
    )
    parser.add_argument(
        "--in-process", action="store_true", help="no process of its own for the engine"
    )
    engine = parser.add_argument_group("given to vLLM")
    add_engine_options(engine)
    engine.add_argument(
        "--max-model-len",
        type=positive,
        help=f"(default: what the workloads need and {SPARE_TOKENS} more)",
    )
    engine.add_argument("--tensor-parallel-size", type=positive, default=1)
    engine.add_argument(
        "--gpu-memory-utilization",
        type=float,
        help="the share that must be free when an engine starts, also where "
        "--kv-cache-memory-bytes is given",
    )
    engine.add_argument(
        "--kv-cache-memory-bytes",
        type=positive,
        help="for each engine, on each GPU or CPU: all arms share the memory, and what "
        "is left for the cache is not measured",
    )
    engine.add_argument("--max-num-batched-tokens", type=positive)
    engine.add_argument("--seed", type=natural, default=0, help="of prompts too")
    return parser


def fit_max_model_len(options: argparse.Namespace, workloads: list[Workload]) -> None:
    """Set --max-model-len where it is not given. Raises UsageError where it is short."""
    needed = max(each.input_tokens + each.output_tokens for each in workloads)
    if options.max_model_len is None:
        options.max_model_len = needed + SPARE_TOKENS
    elif options.max_model_len < needed:
        raise UsageError(
            f"--max-model-len {options.max_model_len} is less than the {needed} tokens "
            "that the workloads need"
        )


def make_plan(
    options: argparse.Namespace, arms: list[Arm], workloads: list[Workload]
) -> Plan:
    """All that can be known before an engine starts. Raises UsageError."""
    model = options.model.resolve()
    num_hidden_layers = read_num_hidden_layers(model)
    started = f"{datetime.now(timezone.utc):%Y%m%dT%H%M%SZ}"
    out = options.out or RESULTS / f"{model.name}-{started}.jsonl"
    if out.exists():
        read_records(out)
    fit_max_model_len(options, workloads)
    setting = make_setting(options, arms, num_hidden_layers, options.in_process)
    return Plan(model, workloads, options.repeats, setting, started, out)


def benchmark(options: argparse.Namespace) -> int:
    """Run all arms and report; 1 where one failed. Raises UsageError before any runs."""
    workloads = distinct(
        "workload", list(map(parse_workload, options.workloads.split(",")))
    )
    arms = distinct("arm", [NATIVE, *map(parse_arm, options.arm)])
    plan = make_plan(options, arms, workloads)
    plan.out.parent.mkdir(parents=True, exist_ok=True)
    failures = run_arms(arms, plan, options.starts)
    say(f"records: {plan.out}")
    try:
        report([plan.out], options.markdown, options.plot, options.curve)
    except UsageError as error:
        # What was asked for was right: a native run failed.
        say(str(error))
        return 1
    return min(failures, 1)


def run_arms(arms: list[Arm], plan: Plan, starts: int) -> int:
    """Build all engines, `starts` at a time, and run all workloads; how many failed."""
    # An engine takes seconds to end: the inner stack tells all, the outer one waits.
    with contextlib.ExitStack() as closes, contextlib.ExitStack() as terminates:
        residents: list[ResidentArm] = []
        for first in range(0, len(arms), starts):
            batch = []
            for arm in arms[first : first + starts]:
                resident = ResidentArm(arm, plan)
                closes.callback(resident.close)
                terminates.callback(resident.terminate)
                batch.append(resident)
            residents += [each for each in batch if built(each)]
        for workload in plan.workloads:
            residents = run_workload(residents, workload, plan)
    return len(arms) - len(residents)


def built(resident: ResidentArm) -> bool:
    try:
        resident.wait_until_built()
    except ArmFailed as error:
        say(f"arm {resident.arm.name} failed while its engine was built: {error}")
        return False
    say(f"arm {resident.arm.name}: built in {resident.build_seconds:.0f} s")
    return True


def run_workload(
    residents: list[ResidentArm], workload: Workload, plan: Plan
) -> list[ResidentArm]:
    """Append one record an arm; the arms that did not fail."""
    warmups = plan.setting.warmups
    runs: dict[ResidentArm, list[Run]] = {resident: [] for resident in residents}
    for number in range(warmups + plan.repeats):
        for resident in in_turn(residents, number):
            if resident not in runs:
                continue
            try:
                run = resident.run(workload, number)
            except ArmFailed as error:
                say(f"arm {resident.arm.name} failed in {workload.name}: {error}")
                del runs[resident]
                continue
            if number >= warmups:
                runs[resident].append(run)
    for resident, timed in runs.items():
        record = make_record(plan, resident.arm, resident.build_seconds, workload, timed)
        append_record(record, plan.out)
        say(
            f"{workload.name}, {resident.arm.name}: "
            f"{record.tokens_per_second:,.1f} tokens/s"
        )
    return list(runs)


def in_turn(items: list[Any], number: int) -> list[Any]:
    """Another order in each round, so that none always follows the same one.

    In as many rounds as there are items each has each place; then mirrored.
    """
    laps, shift = divmod(number, max(1, len(items)))
    turn = items[shift:] + items[:shift]
    return turn[::-1] if laps % 2 else turn


def say(text: str) -> None:
    """To stderr: stdout is for the tables."""
    print(text, file=sys.stderr, flush=True)


def main(arguments: list[str] | None = None) -> int:
    cli = parser()
    options = cli.parse_args(arguments)
    try:
        if options.curve and not options.plot:
            raise UsageError("--curve needs --plot PNG")
        if options.plot and importlib.util.find_spec("matplotlib") is None:
            raise UsageError("--plot needs matplotlib: pip install matplotlib")
        if options.model:
            with interruptible():
                return benchmark(options)
        report(options.report, options.markdown, options.plot, options.curve)
    except UsageError as error:
        cli.error(str(error))
    except KeyboardInterrupt:
        say("interrupted; finished workloads are recorded")
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
