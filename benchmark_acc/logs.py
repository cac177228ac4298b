"""What one arm answered: read from lm-eval's logs, kept in one file of its own.

lm-eval writes a file of results and one of samples for each task. All that a
comparison needs of them goes to `arm.jsonl`: a line about the arm, then one for each
sample, with hashes in place of texts. An arm without that file did not finish.
"""

import hashlib
import json
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

FILE = "arm.jsonl"
HASH_DIGITS = 16


class LogError(Exception):
    """A log that cannot be used; the text is one line that says why."""


@dataclass(frozen=True)
class Sample:
    """What an arm answered to one document."""

    doc_id: int
    doc_hash: str
    scores: dict[str, Any]
    """By `metric,filter`: a number, or a number and its weight."""
    logprobs: list[float]
    """Of the continuations that were scored; none for generated text."""
    prediction: Any
    """What the arm chose; None where the task asks for no choice."""
    text: str | None
    """A hash of the generated text; None where there is none."""


@dataclass(frozen=True)
class Metric:
    """One figure of a task, as lm-eval gives it."""

    value: float
    stderr: float | None
    aggregation: str | None
    """lm-eval's name of how it comes from the samples' scores."""


@dataclass(frozen=True)
class Task:
    """A task's figures and the samples behind them."""

    output_type: str
    metrics: dict[str, Metric]
    """By `metric,filter`."""
    samples: list[Sample]
    """In the order of the documents."""


@dataclass(frozen=True, kw_only=True)
class Setting:
    """All that must be equal for two arms to be compared."""

    model: str
    """The name of the model's folder."""
    dtype: str
    tensor_parallel_size: int
    model_args: str
    """More arguments of the engine, as lm-eval reads them."""
    limit: int | None
    """The number of samples of each task; None is all."""
    seed: int
    versions: dict[str, str]
    accelerator: str
    """The GPU's name, or the CPU's where there is no GPU."""


@dataclass(frozen=True, kw_only=True)
class Arm(Setting):
    """What one arm did in one evaluation."""

    arm: str
    """`plain`, or `scx-` and the encoded layers."""
    layers: str
    """As in SCX_ENC_LAYERS; empty is off."""
    secure_device: str
    codec: str = "permutation"
    cores: int
    commit: str | None
    """Of this package; None outside a checkout."""
    dirty: bool | None
    """Whether a tracked file differed from the commit; None outside a checkout."""
    utc: str
    """When the arm finished."""
    tasks: dict[str, Task]

    @property
    def setting(self) -> dict[str, Any]:
        return {field.name: getattr(self, field.name) for field in fields(Setting)}


def read_lm_eval(folder: Path) -> dict[str, Task]:
    """The tasks of one run of lm-eval. Raises LogError.

    lm-eval only warns where it cannot write a file, so samples are counted here.
    """
    found = list(folder.glob("results_*.json"))
    if len(found) != 1:
        raise LogError(f"{folder}: {len(found)} files of results, not 1")
    results = json.loads(found[0].read_text())
    tasks = {}
    for name, config in results["configs"].items():
        samples = _samples(folder, name, config["output_type"])
        expected = results["n-samples"][name]["effective"]
        if len(samples) != expected:
            raise LogError(f"{folder}: {len(samples)} samples of {name}, not {expected}")
        metrics = _metrics(results["results"][name], config["metric_list"])
        tasks[name] = Task(config["output_type"], metrics, samples)
    return tasks


def _metrics(
    results: dict[str, Any], descriptions: list[dict[str, Any]]
) -> dict[str, Metric]:
    aggregations = {each["metric"]: each.get("aggregation") for each in descriptions}
    metrics = {}
    for key, value in sorted(results.items()):
        metric, comma, filter_name = key.partition(",")
        if comma and not metric.endswith("_stderr"):
            stderr = results.get(f"{metric}_stderr,{filter_name}")
            known = stderr if isinstance(stderr, float) else None
            metrics[key] = Metric(value, known, aggregations.get(metric))
    return metrics


def _samples(folder: Path, task: str, output_type: str) -> list[Sample]:
    """lm-eval writes a line for each document and filter."""
    entries: dict[int, list[dict[str, Any]]] = {}
    # What follows the name is a time: other tasks' names may begin with this one's.
    for path in folder.glob(f"samples_{task}_[0-9][0-9][0-9][0-9]-*.jsonl"):
        for line in path.read_text().splitlines():
            entry = json.loads(line)
            entries.setdefault(entry["doc_id"], []).append(entry)
    return [_sample(output_type, entries[doc_id]) for doc_id in sorted(entries)]


def _sample(output_type: str, entries: list[dict[str, Any]]) -> Sample:
    """One sample of its entries, which differ by filter."""
    first = entries[0]
    # For each request of a document lm-eval keeps a list of repeated answers.
    answers = [repeats[0] for repeats in first["resps"]]
    logprobs, prediction, text = [], None, None
    if output_type == "generate_until":
        prediction = _digest([entry["filtered_resps"] for entry in entries])
        text = _digest(answers)
    elif output_type == "loglikelihood_rolling":
        logprobs = [float(logprob) for logprob in answers]
    else:
        logprobs = [float(logprob) for logprob, _ in answers]
        if output_type == "multiple_choice":
            prediction = logprobs.index(max(logprobs))
        else:
            # Whether the arm itself would have gone on like this.
            prediction = [greedy == "True" for _, greedy in answers]
    return Sample(
        doc_id=first["doc_id"],
        doc_hash=first["doc_hash"][:HASH_DIGITS],
        scores={
            f"{metric},{entry['filter']}": entry[metric]
            for entry in entries
            for metric in sorted(entry["metrics"])
        },
        logprobs=logprobs,
        prediction=prediction,
        text=text,
    )


def _digest(value: Any) -> str:
    return hashlib.sha256(json.dumps(value).encode()).hexdigest()[:HASH_DIGITS]


def write_arm(arm: Arm, folder: Path) -> None:
    """Write `arm.jsonl`."""
    about = asdict(arm)
    lines = [about]
    for name, task in about["tasks"].items():
        lines += [{"task": name} | sample for sample in task["samples"]]
        task["samples"] = len(task["samples"])
    (folder / FILE).write_text("".join(json.dumps(line) + "\n" for line in lines))


def read_arm(path: Path) -> Arm:
    """An arm from its `arm.jsonl`. Raises LogError."""
    try:
        about, *lines = map(json.loads, path.read_text().splitlines())
        samples = {name: [] for name in about["tasks"]}
        for line in lines:
            samples[line.pop("task")].append(Sample(**line))
        for name, task in about["tasks"].items():
            if len(samples[name]) != task["samples"]:
                raise ValueError(f"{len(samples[name])} samples of {name}")
            metrics = {key: Metric(**metric) for key, metric in task["metrics"].items()}
            about["tasks"][name] = Task(task["output_type"], metrics, samples[name])
        return Arm(**about)
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise LogError(f"{path} is no arm of this benchmark: {error}") from error
