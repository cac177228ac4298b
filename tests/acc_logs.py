"""Logs as lm-eval writes them, made by hand."""

import hashlib
import json
import os
import subprocess
import time
from pathlib import Path
from typing import Any

from lab.cli import UsageError

DATE = "2026-01-02T03-04-05.678901"
FIGURES = {"acc,none": 0.5, "perplexity,none": 2.0}
PASSAGE = "a passage that is not to be copied"


def loglikelihood(scores: list[tuple[float, int]]) -> dict[str, Any]:
    """A task of which each sample is a log-probability and whether it was greedy."""
    return {
        "output_type": "loglikelihood",
        "metric_list": [
            {"metric": "acc", "aggregation": "mean"},
            {"metric": "perplexity", "aggregation": "perplexity"},
        ],
        "samples": [
            [
                {
                    "resps": [[[str(logprob), str(bool(acc))]]],
                    "filtered_resps": [[str(logprob), str(bool(acc))]],
                    "filter": "none",
                    "perplexity": logprob,
                    "acc": acc,
                }
            ]
            for logprob, acc in scores
        ],
    }


def generation(texts: list[str]) -> dict[str, Any]:
    """A task with two filters: the first word, and the last, to be `yes`."""
    return {
        "output_type": "generate_until",
        "metric_list": [{"metric": "exact_match", "aggregation": "mean"}],
        "samples": [
            [
                {
                    "resps": [[text]],
                    "filtered_resps": [text.split()[at]],
                    "filter": name,
                    "exact_match": float(text.split()[at] == "yes"),
                }
                for name, at in (("first", 0), ("last", -1))
            ]
            for text in texts
        ],
    }


def multiple_choice(choices: list[list[float]]) -> dict[str, Any]:
    """A task of which each sample is the log-probabilities of its choices."""
    return {
        "output_type": "multiple_choice",
        "metric_list": [{"metric": "acc", "aggregation": "mean"}],
        "samples": [
            [
                {
                    "resps": [[[str(logprob), "False"]] for logprob in logprobs],
                    "filtered_resps": [[str(logprob), "False"] for logprob in logprobs],
                    "filter": "none",
                    "acc": float(logprobs[0] == max(logprobs)),
                }
            ]
            for logprobs in choices
        ],
    }


def rolling(scores: list[tuple[float, int]]) -> dict[str, Any]:
    """A task of which each sample is a log-probability and a number of words."""
    return {
        "output_type": "loglikelihood_rolling",
        "metric_list": [
            {"metric": "word_perplexity", "aggregation": "weighted_perplexity"},
            {"metric": "own", "aggregation": "a function of the task"},
        ],
        "samples": [
            [
                {
                    "resps": [[str(logprob)]],
                    "filtered_resps": [str(logprob)],
                    "filter": "none",
                    "word_perplexity": [logprob, words],
                    "own": 1.0,
                }
            ]
            for logprob, words in scores
        ],
    }


def write(folder: Path, values: dict[str, float], **tasks: dict[str, Any]) -> Path:
    """The files of one run. `values` are lm-eval's figures, by `metric,filter`."""
    folder.mkdir(parents=True, exist_ok=True)
    results = {"configs": {}, "n-samples": {}, "results": {}}
    for name, task in tasks.items():
        lines = []
        for doc_id, entries in enumerate(task["samples"]):
            for entry in entries:
                metrics = [each["metric"] for each in task["metric_list"]]
                lines.append(document(doc_id) | entry | {"metrics": metrics})
        # Not in the order of the documents, which ranks of a group do not keep.
        text = "".join(json.dumps(line) + "\n" for line in reversed(lines))
        (folder / f"samples_{name}_{DATE}.jsonl").write_text(text)
        config = {key: task[key] for key in ("output_type", "metric_list")}
        results["configs"][name] = config
        results["n-samples"][name] = {"effective": len(task["samples"])}
        filters = {entry["filter"] for entries in task["samples"] for entry in entries}
        results["results"][name] = {"alias": name, "sample_len": 1}
        for metric in (each["metric"] for each in task["metric_list"]):
            for each in filters:
                key = f"{metric},{each}"
                results["results"][name] |= {
                    key: values[key],
                    f"{metric}_stderr,{each}": 0.125 if metric == "own" else "N/A",
                }
    (folder / f"results_{DATE}.json").write_text(json.dumps(results))
    return folder


def document(doc_id: int) -> dict[str, Any]:
    text = f"{PASSAGE} {doc_id}"
    return {
        "doc_id": doc_id,
        "doc": {"text": text},
        "arguments": {"gen_args_0": {"arg_0": text}},
        "target": "yes",
        "doc_hash": hashlib.sha256(text.encode()).hexdigest(),
    }


# Stand-ins for benchmark_acc.evaluation.evaluate.


def write_whole(_plan, layers, folder):
    write(folder, FIGURES, t=loglikelihood([(-1.0, len(layers))]))


def write_half(plan, layers, folder):
    write_whole(plan, layers, folder)
    for path in folder.glob("samples_*"):
        path.write_text("")


def write_and_fail(plan, layers, folder):
    write_whole(plan, layers, folder)
    raise ValueError("many lines\nand the last")


def write_and_die(plan, layers, folder):
    write_whole(plan, layers, folder)
    os._exit(3)


def write_and_refuse(plan, layers, folder):
    write_whole(plan, layers, folder)
    raise UsageError("no such thing")


def start_another_and_wait(plan, layers, folder):
    write_whole(plan, layers, folder)
    other = subprocess.Popen(["sleep", "60"])  # noqa: S607
    (folder.parent / "pids.draft").write_text(f"{os.getpid()} {other.pid}")
    (folder.parent / "pids.draft").rename(folder.parent / "pids")
    time.sleep(60)
