"""Throughput with layers encoded, next to vLLM without encoding.

    python -m benchmark_throughput.compare --model PATH --arm 0,27 --arm all@cuda
    python -m benchmark_throughput.compare --report FILE.jsonl [--markdown] [--plot F.png]

The native arm always runs. Every arm of every round runs in a process of its
own, in turn (native, first, second, native, ...), so that drift of the machine
falls on all. Each finished workload appends one line to a file of records;
the table and the plot are made from such files.
"""

import argparse
import importlib.util
import json
import statistics
import sys
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import Any, NoReturn

from benchmark_throughput.harness import (
    NATIVE,
    WORKLOADS,
    Arm,
    Plan,
    Record,
    Setting,
    UsageError,
    Workload,
    in_new_process,
    parse_arm,
    parse_workload,
    read_records,
    run_arm,
    survey,
)

RESULTS = Path(__file__).parent / "results"
SPARE_TOKENS = 8
LEGEND = (
    "native: median tokens/s; others: ratio to native, median (min to max), over all "
    "rounds and repeats. decode*: output tokens count; otherwise input and output."
)


@dataclass(frozen=True)
class Comparison:
    """The arms of one setting; workloads are named with their sizes."""

    setting: dict[str, Any]
    """The fields of Setting."""
    rates: dict[tuple[str, str], list[float]]
    """Tokens a second of each timed run of all rounds, by arm and workload."""

    @property
    def arms(self) -> list[str]:
        """Native first, the others in the order in which they ran."""
        names = dict.fromkeys(arm for arm, _ in self.rates)
        return [NATIVE.name, *(name for name in names if name != NATIVE.name)]

    @property
    def workloads(self) -> list[str]:
        return list(dict.fromkeys(workload for _, workload in self.rates))

    def native(self, workload: str) -> float:
        """The median tokens a second of the native arm."""
        return statistics.median(self.rates[NATIVE.name, workload])

    def ratios(self, arm: str, workload: str) -> list[float]:
        """Each run's speed over the native median, sorted; empty if it did not run."""
        native = self.native(workload)
        return sorted(rate / native for rate in self.rates.get((arm, workload), []))

    @property
    def title(self) -> str:
        """Three lines: what ran where, on which versions, and how."""
        setting = self.setting
        versions = ", ".join(f"{k} {v}" for k, v in setting["versions"].items())
        commit = (setting["commit"] or "no commit")[:10]
        changed = " with changes" if setting["dirty"] else ""
        arguments = setting["engine_args"]
        how = [
            f"{arguments['dtype']}",
            f"tensor parallel {arguments['tensor_parallel_size']}",
            f"max_model_len {arguments['max_model_len']}",
            "eager" if arguments["enforce_eager"] else "compiled",
            f"engine in {'this' if setting['in_process'] else 'its own'} process",
            f"commit {commit}{changed}",
        ]
        where = (
            f"{setting['model']} on {setting['accelerator']}, {setting['cores']} cores"
        )
        return "\n".join([where, versions, ", ".join(how)])


def compare(records: list[Record]) -> list[Comparison]:
    """One comparison for each setting. Raises UsageError where native is missing."""
    groups: dict[str, Comparison] = {}
    for record in records:
        key = json.dumps(record.setting, sort_keys=True)
        group = groups.setdefault(key, Comparison(record.setting, {}))
        workload = f"{record.workload} {record.size}"
        group.rates.setdefault((record.arm, workload), []).extend(record.rates)
    if not groups:
        raise UsageError("there are no records to report")
    for group in groups.values():
        for arm, workload in group.rates:
            if (NATIVE.name, workload) not in group.rates:
                raise UsageError(
                    f"no native record to compare {arm} with: workload {workload}, "
                    f"model {group.setting['model']}, same engine, machine and versions"
                )
    return list(groups.values())


def table(comparison: Comparison) -> list[list[str]]:
    """Rows of cells, the head first."""
    workloads = comparison.workloads
    rows = [["arm", *workloads]]
    for arm in comparison.arms:
        if arm == NATIVE.name:
            cells = [f"{comparison.native(workload):,.1f}" for workload in workloads]
        else:
            cells = [ratio_cell(comparison.ratios(arm, each)) for each in workloads]
        rows.append([arm, *cells])
    return rows


def ratio_cell(ratios: list[float]) -> str:
    """Median (min to max) of sorted ratios."""
    if not ratios:
        return "-"
    return f"{statistics.median(ratios):.3f} ({ratios[0]:.3f} to {ratios[-1]:.3f})"


def as_text(rows: list[list[str]]) -> str:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]

    def line(row: list[str]) -> str:
        first, *others = (
            cell.rjust(width) for cell, width in zip(row, widths, strict=True)
        )
        return "  ".join([first.strip().ljust(widths[0]), *others])

    return "\n".join(map(line, rows))


def as_markdown(rows: list[list[str]]) -> str:
    head, *body = (f"| {' | '.join(row)} |" for row in rows)
    rule = "|---|" + "---:|" * (len(rows[0]) - 1)
    return "\n".join([head, rule, *body])


def report(paths: list[Path], markdown: bool, plot_path: Path | None) -> None:
    """Print the tables of some files of records; draw them where a path is given."""
    comparisons = compare([record for path in paths for record in read_records(path)])
    render = as_markdown if markdown else as_text
    for comparison in comparisons:
        print(f"{comparison.title}\n\n{render(table(comparison))}\n")
    print(LEGEND)
    if plot_path is not None:
        plot(comparisons, plot_path)


def plot(comparisons: list[Comparison], path: Path) -> None:
    """Draw one panel of bars for each setting."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    bars = max(len(each.workloads) * len(each.arms) for each in comparisons)
    figure, panels = pyplot.subplots(
        len(comparisons),
        squeeze=False,
        figsize=(max(8.0, 0.8 * bars), 5.0 * len(comparisons)),
        layout="constrained",
    )
    for axes, comparison in zip(panels[:, 0], comparisons, strict=True):
        draw(axes, comparison)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)
    pyplot.close(figure)


def draw(axes: Any, comparison: Comparison) -> None:
    """Bars of the ratios, grouped by workload; thin lines from the least to the most."""
    arms = comparison.arms[1:]
    width = 0.8 / max(1, len(arms))
    top = 1.0
    for index, arm in enumerate(arms):
        for group, workload in enumerate(comparison.workloads):
            ratios = comparison.ratios(arm, workload)
            if not ratios:
                continue
            x = group + (index - (len(arms) - 1) / 2) * width
            middle = statistics.median(ratios)
            # The first group alone names the arm in the legend.
            label = arm if arm not in axes.get_legend_handles_labels()[1] else None
            axes.bar(x, middle, 0.9 * width, color=f"C{index % 10}", label=label)
            axes.vlines(x, ratios[0], ratios[-1], color="black", linewidth=1)
            axes.annotate(
                f"{middle:.2f}",
                (x, ratios[-1]),
                xytext=(0, 4),
                textcoords="offset points",
                ha="center",
                fontsize=8,
                # White, so that the line of the native arm does not strike it out.
                bbox={"facecolor": "white", "edgecolor": "none", "pad": 1},
            )
            top = max(top, ratios[-1])
    axes.axhline(1, color="gray", linestyle="--", linewidth=1, label="native")
    axes.set_ylim(0, 1.12 * top)
    axes.set_xticks(
        range(len(comparison.workloads)),
        [f"{each}\n{comparison.native(each):,.0f}" for each in comparison.workloads],
    )
    axes.set_xlabel("workload: prompts x input + output tokens; below, native tokens/s")
    axes.set_ylabel("throughput, ratio to native")
    axes.set_title(comparison.title, fontsize=8)
    axes.legend(title="layers@device", loc="center left", bbox_to_anchor=(1, 0.5))


class Parser(argparse.ArgumentParser):
    """A parser whose errors are one line."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: {message}\n")


def parser() -> Parser:
    parser = Parser(
        prog="python -m benchmark_throughput.compare",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
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
    parser.add_argument("--rounds", type=positive, default=1, help="(default: 1)")
    parser.add_argument("--warmups", type=natural, default=2, help="runs (default: 2)")
    parser.add_argument(
        "--repeats", type=positive, default=5, help="timed runs (default: 5)"
    )
    parser.add_argument("--out", type=Path, metavar="FILE", help="records are appended")
    parser.add_argument("--markdown", action="store_true", help="tables in Markdown")
    parser.add_argument("--plot", type=Path, metavar="PNG", help="draw the ratios")
    parser.add_argument(
        "--in-process", action="store_true", help="no process of its own for the engine"
    )
    engine = parser.add_argument_group("given to vLLM")
    engine.add_argument("--dtype", default="bfloat16", help="(default: bfloat16)")
    engine.add_argument(
        "--max-model-len",
        type=positive,
        help=f"(default: what the workloads need and {SPARE_TOKENS} more)",
    )
    engine.add_argument("--tensor-parallel-size", type=positive, default=1)
    engine.add_argument("--gpu-memory-utilization", type=float)
    engine.add_argument("--load-format", help="dummy, for example: random weights")
    engine.add_argument("--enforce-eager", action="store_true")
    engine.add_argument("--attention-backend")
    engine.add_argument("--max-num-batched-tokens", type=positive)
    engine.add_argument("--seed", type=natural, default=0, help="of prompts too")
    return parser


def positive(text: str) -> int:
    """A whole number from 1."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number from 1")
    return int(text)


def natural(text: str) -> int:
    """A whole number from 0."""
    if not text.isdecimal():
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number from 0")
    return int(text)


def distinct(kind: str, items: list[Any]) -> list[Any]:
    """The same items. Raises UsageError where two have one name."""
    names = [item.name for item in items]
    if repeated := [name for name in names if names.count(name) > 1]:
        raise UsageError(f"{kind} {repeated[0]!r} is given more than once")
    return items


def engine_args(options: argparse.Namespace, workloads: list[Workload]) -> dict[str, Any]:
    """The arguments of vllm.LLM, model aside; vLLM's defaults where none is given."""
    needed = max(each.input_tokens + each.output_tokens for each in workloads)
    if options.max_model_len is not None and options.max_model_len < needed:
        raise UsageError(
            f"--max-model-len {options.max_model_len} is less than the {needed} tokens "
            "that the workloads need"
        )
    arguments = {
        "dtype": options.dtype,
        "max_model_len": options.max_model_len or needed + SPARE_TOKENS,
        "tensor_parallel_size": options.tensor_parallel_size,
        "enforce_eager": options.enforce_eager,
        "seed": options.seed,
        # Prompts are token ids and so is what is read of the outputs.
        "skip_tokenizer_init": True,
        # A repeated run must not be cheaper than the first.
        "enable_prefix_caching": False,
        # Without statistics, requests carry no times.
        "disable_log_stats": False,
    }
    optional = (
        "gpu_memory_utilization",
        "load_format",
        "attention_backend",
        "max_num_batched_tokens",
    )
    given = {name: getattr(options, name) for name in optional}
    return arguments | {name: value for name, value in given.items() if value is not None}


def make_plan(
    options: argparse.Namespace, arms: list[Arm], workloads: list[Workload]
) -> Plan:
    """All that can be known before an engine starts. Raises UsageError."""
    if not (options.model / "config.json").is_file():
        raise UsageError(f"--model {options.model}: no folder with a config.json")
    model = options.model.resolve()
    now = datetime.now(timezone.utc).strftime("%Y%m%dT%H%M%SZ")
    out = options.out or RESULTS / f"{model.name}-{now}.jsonl"
    if out.exists():
        read_records(out)
    arguments = engine_args(options, workloads)
    setting = Setting(
        model=model.name,
        engine_args=arguments,
        in_process=options.in_process,
        warmups=options.warmups,
        seed=options.seed,
        **in_new_process(survey, arms),
    )
    return Plan(model, workloads, options.repeats, setting, out)


def benchmark(options: argparse.Namespace) -> int:
    """Run all arms and report; 1 where one failed. Raises UsageError before any runs."""
    workloads = distinct(
        "workload", list(map(parse_workload, options.workloads.split(",")))
    )
    arms = distinct("arm", [NATIVE, *map(parse_arm, options.arm)])
    plan = make_plan(options, arms, workloads)
    plan.out.parent.mkdir(parents=True, exist_ok=True)
    failures = 0
    for round_number in range(1, options.rounds + 1):
        for arm in arms:
            say(f"round {round_number} of {options.rounds}, arm {arm.name}")
            try:
                in_new_process(run_arm, arm, round_number, plan)
            # Whatever ended that process, the other arms are worth having.
            except Exception as error:
                reason = (str(error).strip() or type(error).__name__).splitlines()[-1]
                say(f"arm {arm.name} failed in round {round_number}: {reason}")
                failures += 1
    say(f"records: {plan.out}")
    try:
        report([plan.out], options.markdown, options.plot)
    except UsageError as error:
        # What was asked for was right: a native run failed.
        say(str(error))
        return 1
    return min(failures, 1)


def say(text: str) -> None:
    """To stderr: stdout is for the tables."""
    print(text, file=sys.stderr, flush=True)


def main() -> int:
    cli = parser()
    options = cli.parse_args()
    try:
        if options.plot and importlib.util.find_spec("matplotlib") is None:
            raise UsageError("--plot needs matplotlib: pip install matplotlib")
        if options.model:
            return benchmark(options)
        report(options.report, options.markdown, options.plot)
    except UsageError as error:
        cli.error(str(error))
    except KeyboardInterrupt:
        say("interrupted; finished workloads are recorded")
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
