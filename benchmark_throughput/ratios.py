"""Ratios to native speed, from records: tables and plots."""

import json
import statistics
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmark_throughput.records import NATIVE, Record, read_records
from lab.cli import UsageError
from lab.tables import as_markdown, as_text

LEGEND = (
    "throughput: native's median tokens/s; others: ratio to native in the same round, "
    "median (min to max) over all rounds. decode*: output tokens count; otherwise input "
    "and output. TTFT, TPOT: median over requests. CPU cores: used on the host, median."
)


@dataclass(frozen=True)
class Comparison:
    """The records of one setting; workloads are named with their sizes."""

    setting: dict[str, Any]
    """The fields of Setting."""
    records: list[Record]

    @property
    def arms(self) -> list[str]:
        """Native first, the others in the order in which they ran."""
        names = dict.fromkeys(record.arm for record in self.records)
        return [NATIVE.name, *(name for name in names if name != NATIVE.name)]

    @property
    def workloads(self) -> list[str]:
        return list(dict.fromkeys(record.sized_workload for record in self.records))

    def of(self, arm: str, workload: str) -> list[Record]:
        return [
            record
            for record in self.records
            if (record.arm, record.sized_workload) == (arm, workload)
        ]

    def native(self, workload: str) -> float:
        """The median tokens per second of the native arm."""
        records = self.of(NATIVE.name, workload)
        return statistics.median(rate for record in records for rate in record.rates)

    def ratios(self, arm: str, workload: str) -> list[float]:
        """Speed over native speed in each round, sorted; empty if the arm did not run.

        The two ran next to each other, so that drift of the machine is in both.
        """
        native = {record.started: record for record in self.of(NATIVE.name, workload)}
        return sorted(
            rate / native_rate
            for record in self.of(arm, workload)
            for rate, native_rate in zip(
                record.rates, native[record.started].rates, strict=True
            )
        )

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
        groups.setdefault(key, Comparison(record.setting, [])).records.append(record)
    if not groups:
        raise UsageError("there are no records to report")
    for group in groups.values():
        for record in group.records:
            native = group.of(NATIVE.name, record.sized_workload)
            if record.started not in [each.started for each in native]:
                raise UsageError(
                    f"no native record to compare {record.arm} with: workload "
                    f"{record.sized_workload}, model {record.model}, same comparison, "
                    "engine, machine and versions"
                )
    return list(groups.values())


def tables(comparison: Comparison) -> list[list[list[str]]]:
    """Each is rows of cells, the head first."""

    def table(
        head: str, cell: Callable[[str, str], str], native_cell: Callable[[str], str]
    ) -> list[list[str]]:
        workloads = comparison.workloads
        native, *others = comparison.arms
        return [
            [head, *workloads],
            [native, *map(native_cell, workloads)],
            *([arm, *(cell(arm, each) for each in workloads)] for arm in others),
        ]

    def medians(head: str, values: Callable[[Record], list[float]]) -> list[list[str]]:
        def cell(arm: str, workload: str) -> str:
            records = comparison.of(arm, workload)
            found = [value for record in records for value in values(record)]
            return f"{statistics.median(found):,.2f}" if found else "-"

        return table(head, cell, lambda workload: cell(NATIVE.name, workload))

    return [
        table(
            "throughput",
            lambda arm, workload: ratio_cell(comparison.ratios(arm, workload)),
            lambda workload: f"{comparison.native(workload):,.1f}",
        ),
        medians("TTFT, ms", lambda record: milliseconds(record.ttft_seconds)),
        medians("TPOT, ms", lambda record: milliseconds(record.tpot_seconds)),
        medians("CPU cores", lambda record: record.cpu_ratio),
    ]


def ratio_cell(ratios: list[float]) -> str:
    """Median (min to max) of sorted ratios."""
    if not ratios:
        return "-"
    return f"{statistics.median(ratios):.3f} ({ratios[0]:.3f} to {ratios[-1]:.3f})"


def milliseconds(seconds: float | None) -> list[float]:
    return [] if seconds is None else [1000 * seconds]


def report(
    paths: list[Path], markdown: bool, plot_path: Path | None, curve: str | None
) -> None:
    """Print the tables of some files of records; draw them where a path is given."""
    comparisons = compare([record for path in paths for record in read_records(path)])
    render = as_markdown if markdown else as_text
    for comparison in comparisons:
        print(comparison.title, *map(render, tables(comparison)), sep="\n\n", end="\n\n")
    print(LEGEND)
    if plot_path is not None:
        plot(comparisons, plot_path, curve)


def plot(comparisons: list[Comparison], path: Path, curve: str | None) -> None:
    """Draw one panel for each setting: bars, or curves over what `curve` names."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    bars = max(len(each.workloads) * len(each.arms) for each in comparisons)
    figure, panels = pyplot.subplots(
        len(comparisons),
        squeeze=False,
        figsize=(8.0 if curve else max(8.0, 0.8 * bars), 5.0 * len(comparisons)),
        layout="constrained",
    )
    for axes, comparison in zip(panels[:, 0], comparisons, strict=True):
        if curve:
            draw_curves(axes, comparison, curve)
        else:
            draw_bars(axes, comparison)
        axes.axhline(1, color="gray", linestyle="--", linewidth=1, label="native")
        axes.set_ylim(bottom=0)
        axes.set_ylabel("throughput, ratio to native")
        axes.set_title(comparison.title, fontsize=8, loc="left")
        axes.legend(loc="center left", bbox_to_anchor=(1, 0.5))
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)
    pyplot.close(figure)


def draw_bars(axes: Any, comparison: Comparison) -> None:
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
    axes.set_ylim(top=1.12 * top)
    axes.set_xticks(
        range(len(comparison.workloads)),
        [f"{each}\n{comparison.native(each):,.0f}" for each in comparison.workloads],
    )
    axes.set_xlabel("workload: prompts x input + output tokens; below, native tokens/s")


@dataclass(frozen=True)
class Curve:
    """What a plot can have on its x axis; records that else are equal share a line."""

    axis: str
    x: Callable[[Record], int]
    line: Callable[[Record], str]


CURVES = {
    "layers": Curve(
        "encoded layers",
        lambda record: record.encoded_layers,
        lambda record: f"{record.sized_workload} @{record.device}",
    ),
    "input": Curve(
        "input tokens of each prompt",
        lambda record: record.input_tokens,
        lambda record: f"{record.arm} {record.prompts}xN+{record.output_tokens}",
    ),
    "prompts": Curve(
        "prompts at once",
        lambda record: record.prompts,
        lambda record: f"{record.arm} Nx{record.input_tokens}+{record.output_tokens}",
    ),
}


def curve_points(
    comparison: Comparison, curve: Curve
) -> dict[str, dict[int, list[float]]]:
    """Sorted ratios by line and x; lines of one point are left out.

    Raises UsageError where no line is left.
    """
    lines: dict[str, dict[int, list[float]]] = {}
    for record in sorted(comparison.records, key=curve.x):
        # No layer has no place on a logarithmic axis of layers.
        if record.arm != NATIVE.name and curve.x(record):
            line = lines.setdefault(curve.line(record), {})
            line[curve.x(record)] = comparison.ratios(record.arm, record.sized_workload)
    lines = {name: line for name, line in lines.items() if len(line) > 1}
    if not lines:
        raise UsageError(
            f"no curve over {curve.axis}: no two records that differ in nothing else"
        )
    return lines


def draw_curves(axes: Any, comparison: Comparison, name: str) -> None:
    """Medians of the ratios, joined; bars from the least to the most."""
    curve = CURVES[name]
    for label, points in curve_points(comparison, curve).items():
        middle = [statistics.median(ratios) for ratios in points.values()]
        spread = [
            [y - ratios[0] for y, ratios in zip(middle, points.values(), strict=True)],
            [ratios[-1] - y for y, ratios in zip(middle, points.values(), strict=True)],
        ]
        axes.errorbar(list(points), middle, spread, marker="o", capsize=3, label=label)
    axes.set_xscale("log", base=2)
    ticks = sorted({x for line in axes.get_lines() for x in line.get_xdata()})
    axes.set_xticks(ticks, [str(int(x)) for x in ticks])
    axes.set_xlabel(curve.axis)
