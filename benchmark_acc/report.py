"""Encoded arms next to the plain one, sample by sample.

    python benchmark_acc/report.py FOLDER [FOLDER ...]

Reads every finished arm below the folders and prints a table for each task. Beside
each metric is its standard error; beside its difference to the plain arm is that of
the difference, which is the smaller one, because both arms answered the same samples.
"""

import json
import math
import statistics
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

if __name__ == "__main__":
    # A script looks for modules in its own folder; these are named from the root.
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

from benchmark_acc.logs import FILE, Arm, LogError, Task, read_arm
from lab.cli import Parser
from lab.tables import as_markdown

PLAIN = "plain"

# lm-eval's aggregations that are a function of the (weighted) mean of the scores.
OF_THE_MEAN: dict[str | None, Callable[[float], float]] = {
    "mean": lambda mean: mean,
    "perplexity": lambda mean: math.exp(-mean),
    "weighted_perplexity": lambda mean: math.exp(-mean),
    "bits_per_byte": lambda mean: -mean / math.log(2),
}


@dataclass(frozen=True)
class Figure:
    """A metric, or a difference of two."""

    value: float
    stderr: float | None
    """None where it cannot be told, as from one sample."""


@dataclass(frozen=True)
class Agreement:
    """How far two arms gave the same answers to the same samples."""

    samples: int
    same_predictions: int | None
    """None where the task asks for no choice."""
    same_texts: int | None
    """None where the task generates no text."""
    largest_difference: float | None
    """Between log-probabilities; None where the task scores none."""


def figure(task: Task, key: str) -> Figure:
    """A metric with its standard error: ours, or lm-eval's where we have none."""
    metric, left_out = task.metrics[key], leave_one_out(task, key)
    return Figure(metric.value, jackknife(left_out) if left_out else metric.stderr)


def difference(task: Task, plain: Task, key: str) -> Figure:
    """A metric less that of the plain arm, paired over the samples."""
    value = task.metrics[key].value - plain.metrics[key].value
    ours, theirs = leave_one_out(task, key), leave_one_out(plain, key)
    if ours is None or theirs is None:
        return Figure(value, None)
    return Figure(value, jackknife([a - b for a, b in zip(ours, theirs, strict=True)]))


def leave_one_out(task: Task, key: str) -> list[float] | None:
    """The metric without the first sample, without the second, and so on.

    None where it is no function of a mean, and where no sample would be left.
    """
    of_the_mean = OF_THE_MEAN.get(task.metrics[key].aggregation)
    if of_the_mean is None or len(task.samples) < 2:
        return None
    scores = [sample.scores[key] for sample in task.samples]
    weighted = [score if isinstance(score, list) else (score, 1) for score in scores]
    total, weights = (math.fsum(column) for column in zip(*weighted, strict=True))
    return [of_the_mean((total - x) / (weights - weight)) for x, weight in weighted]


def jackknife(left_out: Sequence[float]) -> float:
    """The standard error of a metric from its values with one sample left out.

    Of a mean it is the usual one: standard deviation over root of the number.
    """
    return math.sqrt((len(left_out) - 1) * statistics.pvariance(left_out))


def agreement(task: Task, plain: Task) -> Agreement:
    """Compare the answers to the same samples."""
    pairs = list(zip(task.samples, plain.samples, strict=True))

    def same(answer: str) -> int | None:
        answers = [(getattr(a, answer), getattr(b, answer)) for a, b in pairs]
        known = [(ours, theirs) for ours, theirs in answers if ours is not None]
        return sum(ours == theirs for ours, theirs in known) if known else None

    differences = [
        abs(ours - theirs)
        for one, other in pairs
        for ours, theirs in zip(one.logprobs, other.logprobs, strict=True)
    ]
    largest = max(differences, default=None)
    return Agreement(len(pairs), same("prediction"), same("text"), largest)


def find_arms(folders: list[Path]) -> list[Arm]:
    """All finished arms below some folders. Raises LogError."""
    found = {path.resolve() for folder in folders for path in folder.rglob(FILE)}
    # A run that is under way, or was killed, is in a folder with a dot.
    paths = sorted(path for path in found if not path.parent.name.startswith("."))
    if not paths:
        raise LogError(f"no finished arm in {', '.join(map(str, folders))}")
    return [read_arm(path) for path in paths]


def report(arms: list[Arm]) -> str:
    """A table for each task, and for each setting where there are several.

    Models and types share a table. Raises LogError.
    """
    groups: dict[str, list[Arm]] = {}
    for arm in arms:
        shared = arm.setting | {"model": None, "dtype": None}
        groups.setdefault(json.dumps(shared, sort_keys=True), []).append(arm)
    parts = []
    for group in groups.values():
        parts.append(title(group))
        for name in dict.fromkeys(name for arm in group for name in arm.tasks):
            table = task_table([arm for arm in group if name in arm.tasks], name)
            parts.append(f"{name}:\n\n{table}")
    return "\n\n".join(parts)


def title(group: list[Arm]) -> str:
    """What ran where, on which versions, and how."""
    arm = group[0]
    versions = ", ".join(f"{name} {number}" for name, number in arm.versions.items())
    commits = sorted(
        {
            (each.commit or "none")[:10] + (" with changes" if each.dirty else "")
            for each in group
        }
    )
    limit = "all samples" if arm.limit is None else f"{arm.limit} samples of each task"
    return (
        f"{arm.accelerator}, tensor parallel {arm.tensor_parallel_size}, "
        f"{arm.model_args or 'no further arguments'}; {versions}; {limit}, "
        f"seed {arm.seed}; commit {', '.join(commits)}"
    )


def task_table(arms: list[Arm], name: str) -> str:
    """In Markdown: one row for each model, type and arm, the plain arm first."""
    rows = []
    for arm in sorted(arms, key=lambda arm: (arm.model, arm.dtype, arm.arm)):
        plain = [a for a in arms if a.arm == PLAIN and a.setting == arm.setting]
        if not plain:
            raise LogError(
                f"no plain arm to compare {arm.arm} with: {name}, {arm.model}, "
                f"{arm.dtype}, same engine, limit, machine and versions"
            )
        task, reference = arm.tasks[name], plain[0].tasks[name]
        if documents(task) != documents(reference):
            raise LogError(f"{arm.arm} and {PLAIN} answered other samples of {name}")
        rows.append(
            {"model": arm.model, "type": arm.dtype, "arm": arm.arm}
            | cells(task, reference, arm.arm == PLAIN)
        )
    return as_markdown(rows)


def documents(task: Task) -> list[tuple[int, str]]:
    return [(sample.doc_id, sample.doc_hash) for sample in task.samples]


def cells(task: Task, plain: Task, is_plain: bool) -> dict[str, str]:
    """What a row says of a task, by column."""
    same = agreement(task, plain)
    found = {}
    for key in task.metrics:
        metric, _, filter_name = key.partition(",")
        label = metric if filter_name == "none" else f"{metric} ({filter_name})"
        own, paired = figure(task, key), difference(task, plain, key)
        found[label] = with_stderr(own, ".4f", ".4f")
        found[f"{label}, difference"] = (
            "" if is_plain else with_stderr(paired, "+.2g", ".1g")
        )
    for label, count in (
        ("same predictions", same.same_predictions),
        ("same texts", same.same_texts),
    ):
        if count is not None:
            found[label] = "" if is_plain else f"{count} of {same.samples}"
    if same.largest_difference is not None:
        largest = "" if is_plain else f"{same.largest_difference:.1e}"
        found["largest log-probability difference"] = largest
    return found


def with_stderr(figure: Figure, form: str, error_form: str) -> str:
    stderr = "?" if figure.stderr is None else format(figure.stderr, error_form)
    return f"{figure.value:{form}} ± {stderr}"


def main(arguments: list[str] | None = None) -> int:
    parser = Parser(description=__doc__)
    parser.add_argument("folders", type=Path, nargs="+", metavar="FOLDER")
    try:
        print(report(find_arms(parser.parse_args(arguments).folders)))
    except LogError as error:
        parser.error(str(error))
    return 0


if __name__ == "__main__":
    sys.exit(main())
