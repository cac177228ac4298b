"""What encoding costs, from logs of single runs.

    python -m benchmark_throughput.overhead LOG [LOG ...] [--plot F.png]

A log is what qwen2-1.5b.py and its like print; its last line is a record. Logs of
one model, machine and setting share a table: plain first, then by encoded layers.
Their runs were not next to each other, so drift of the machine is in the figures;
`python -m benchmark_throughput.compare` has none of it.
"""

import json
import sys
from collections.abc import Sequence
from pathlib import Path

from benchmark_throughput.records import NATIVE, Record
from lab.cli import Parser, UsageError
from lab.tables import as_markdown

NAMES = {0: "plain", 1: "input only"}
"""By encoded layers; the others are input and output, or say how many."""


def read_log(path: Path) -> Record:
    """The record in a log's last line. Raises UsageError, also for an unfinished run."""
    try:
        lines = path.read_text().splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"cannot read {path}: {error}") from error
    try:
        return Record(**json.loads(lines[-1]))
    except (ValueError, TypeError, IndexError) as error:
        raise UsageError(
            f"{path}: its last line is no record, so the run did not finish"
        ) from error


def name_of(record: Record) -> str:
    """What the arm encodes, in words."""
    layers = record.encoded_layers
    if layers == 2 and record.layers == f"0,{record.num_hidden_layers - 1}":
        return "input and output"
    return NAMES.get(layers, f"{layers} layers")


def groups_of(records: Sequence[Record]) -> list[list[Record]]:
    """Records that may be compared, plain first. Raises UsageError where that lacks."""
    found: dict[str, list[Record]] = {}
    for record in records:
        # A commit that changed only documents would keep logs apart.
        shared = record.setting | {"commit": None, "dirty": None}
        key = json.dumps([record.sized_workload, shared], sort_keys=True)
        found.setdefault(key, []).append(record)
    for group in found.values():
        group.sort(key=lambda record: (record.encoded_layers, record.device))
        if group[0].arm != NATIVE.name:
            raise UsageError(
                f"no log of a plain run to compare {group[0].arm} with: "
                f"{group[0].model}, {group[0].sized_workload}, same engine, machine and "
                "versions"
            )
    return list(found.values())


def row(record: Record, plain: Record) -> dict[str, str]:
    """What a line of the table says, by column."""

    def milliseconds(seconds: float | None) -> str:
        return "-" if seconds is None else f"{1e3 * seconds:,.2f}"

    return {
        "arm": name_of(record),
        "layers": record.layers or "none",
        "device": record.device if record.layers else "-",
        "tokens/s": f"{record.tokens_per_second:,.1f}",
        "range": f"{record.tokens_per_second_min:,.1f} to "
        f"{record.tokens_per_second_max:,.1f}",
        "overhead": "-" if record is plain else f"{overhead(record, plain):+.1%}",
        "TTFT, ms": milliseconds(record.ttft_seconds),
        "TPOT, ms": milliseconds(record.tpot_seconds),
    }


def overhead(record: Record, plain: Record) -> float:
    """The share of time that a run takes beyond the plain one, by medians."""
    return plain.tokens_per_second / record.tokens_per_second - 1


def title(record: Record) -> str:
    versions = ", ".join(f"{name} {number}" for name, number in record.versions.items())
    weights = record.engine_args.get("load_format") == "dummy"
    return (
        f"{record.model}{' (dummy weights)' if weights else ''} on {record.accelerator}, "
        f"{record.cores} cores, {record.sized_workload}; {versions}; "
        f"{record.engine_args['dtype']}, seed {record.seed}"
    )


def plot(groups: list[list[Record]], path: Path) -> None:
    """Bars of tokens per second, one panel for each group, the overhead above each."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, panels = pyplot.subplots(
        1, len(groups), squeeze=False, figsize=(5 * len(groups), 5), layout="constrained"
    )
    for axes, group in zip(panels[0], groups, strict=True):
        names = [f"{name_of(record)}\n{record.device}" for record in group]
        bars = axes.bar(names, [record.tokens_per_second for record in group], color="C0")
        labels = ["", *(f"{overhead(record, group[0]):+.1%}" for record in group[1:])]
        axes.bar_label(bars, labels)
        axes.set_ylabel("tokens/s, input and output")
        axes.set_title(f"{group[0].model}, {group[0].sized_workload}", fontsize=9)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)
    pyplot.close(figure)


def main(arguments: list[str] | None = None) -> int:
    parser = Parser(prog="python -m benchmark_throughput.overhead", description=__doc__)
    parser.add_argument("logs", type=Path, nargs="+", metavar="LOG")
    parser.add_argument("--plot", type=Path, metavar="PNG")
    options = parser.parse_args(arguments)
    try:
        groups = groups_of([read_log(path) for path in options.logs])
    except UsageError as error:
        parser.error(str(error))
    for group in groups:
        rows = [row(record, group[0]) for record in group]
        print(f"{title(group[0])}\n\n{as_markdown(rows)}\n")
    if options.plot is not None:
        plot(groups, options.plot)
    return 0


if __name__ == "__main__":
    sys.exit(main())
