"""The comparison of accuracy: from logs made by hand to figures known in advance."""

import json
import math
import random
import shutil
import statistics
from math import e

import pytest

from benchmark_acc import report
from benchmark_acc.logs import Arm, LogError, read_arm, read_lm_eval, write_arm
from tests import acc_logs
from tests.acc_logs import generation, loglikelihood, multiple_choice, rolling


def task_of(folder, values, **tasks):
    return read_lm_eval(acc_logs.write(folder, values, **tasks))


def last_word(folder, scores):
    """The task of one arm, and its figures as lm-eval would give them."""
    values = {
        "acc,none": statistics.mean(acc for _, acc in scores),
        "perplexity,none": math.exp(-statistics.mean(x for x, _ in scores)),
    }
    return task_of(folder, values, t=loglikelihood(scores))["t"]


@pytest.fixture
def pair(tmp_path):
    """Plain, then encoded."""
    return (
        last_word(tmp_path / "plain", [(-1.0, 1), (-3.0, 0)]),
        last_word(tmp_path / "scx", [(-1.5, 1), (-2.0, 1)]),
    )


def test_a_metric_has_its_standard_error(pair):
    plain, encoded = pair
    # Two samples 1 and 0: standard deviation sqrt(1/2), over the root of 2.
    assert report.figure(plain, "acc,none") == report.Figure(0.5, pytest.approx(0.5))
    assert report.figure(encoded, "acc,none") == report.Figure(1.0, 0.0)
    # Without one of two samples the perplexity is that of the other: e and e^3.
    figure = report.figure(plain, "perplexity,none")
    assert figure.value == pytest.approx(e**2)
    assert figure.stderr == pytest.approx((e**3 - e) / 2)


def test_a_difference_is_paired_over_the_samples(pair):
    plain, encoded = pair
    # Sample by sample 0 and 1.
    expected = report.Figure(0.5, pytest.approx(0.5))
    assert report.difference(encoded, plain, "acc,none") == expected
    difference = report.difference(encoded, plain, "perplexity,none")
    assert difference.value == pytest.approx(e**1.75 - e**2)
    # Without the first: e^2 - e^3; without the second: e^1.5 - e.
    assert difference.stderr == pytest.approx(((e**1.5 - e) - (e**2 - e**3)) / 2)
    none = report.difference(plain, plain, "perplexity,none")
    assert none == report.Figure(0.0, 0.0)


def test_the_error_of_a_mean_is_the_usual_one(tmp_path):
    chance = random.Random(0)  # noqa: S311
    scores = [(chance.gauss(-2, 1), chance.randrange(2)) for _ in range(50)]
    task = last_word(tmp_path, scores)
    usual = statistics.stdev(acc for _, acc in scores) / math.sqrt(50)
    assert report.figure(task, "acc,none").stderr == pytest.approx(usual)
    # Of a function of the mean it is, to first order, the slope times that.
    value, stderr = vars(report.figure(task, "perplexity,none")).values()
    usual = statistics.stdev(x for x, _ in scores) / math.sqrt(50)
    assert stderr == pytest.approx(value * usual, rel=0.05)


def test_weighted_metrics_and_those_that_we_do_not_know(tmp_path):
    values = {"word_perplexity,none": math.exp(20 / 10), "own,none": 7.0}
    task = task_of(tmp_path, values, t=rolling([(-8.0, 2), (-12.0, 8)]))["t"]
    figure = report.figure(task, "word_perplexity,none")
    assert figure.value == pytest.approx(e**2)
    # Without the first sample exp(12 / 8), without the second exp(8 / 2).
    assert figure.stderr == pytest.approx((e**4 - e**1.5) / 2)
    assert report.figure(task, "own,none") == report.Figure(7.0, 0.125)
    assert report.difference(task, task, "own,none") == report.Figure(0.0, None)
    assert report.agreement(task, task) == report.Agreement(2, None, None, 0.0)


def test_one_sample_has_no_error(tmp_path):
    task = last_word(tmp_path, [(-1.0, 1)])
    assert report.figure(task, "acc,none").stderr is None
    assert report.difference(task, task, "acc,none").stderr is None


def test_agreement_of_log_probabilities(pair):
    plain, encoded = pair
    assert [sample.doc_id for sample in plain.samples] == [0, 1]
    assert report.agreement(encoded, plain) == report.Agreement(2, 1, None, 1.0)
    assert report.agreement(plain, plain) == report.Agreement(2, 2, None, 0.0)


def test_agreement_of_choices(tmp_path):
    values = {"acc,none": 0.5}
    plain, encoded = (
        task_of(tmp_path / name, values, t=multiple_choice(choices))["t"]
        for name, choices in (
            ("plain", [[-1.0, -2.0], [-1.0, -0.5], [-3.0, -4.0]]),
            ("scx", [[-1.0, -0.75], [-1.0, -0.25], [-3.5, -4.0]]),
        )
    )
    assert report.agreement(encoded, plain) == report.Agreement(3, 2, None, 1.25)


def test_agreement_of_texts(tmp_path):
    values = {"exact_match,first": 0.5, "exact_match,last": 0.5}
    plain, encoded = (
        task_of(tmp_path / name, values, t=generation(texts))["t"]
        for name, texts in (
            ("plain", ["yes it is", "no it is", "no no"]),
            ("scx", ["yes it is", "no so is", "no yes"]),
        )
    )
    # The second text differs, but neither of its filtered words does.
    assert report.agreement(encoded, plain) == report.Agreement(3, 2, 1, None)
    difference = report.difference(encoded, plain, "exact_match,last")
    assert difference == report.Figure(0.0, pytest.approx(1 / 3))
    difference = report.difference(encoded, plain, "exact_match,first")
    assert difference == report.Figure(0.0, 0.0)


def arm(name, tasks, **changes):
    fields = {
        "model": "model",
        "dtype": "float32",
        "tensor_parallel_size": 1,
        "model_args": "",
        "limit": None,
        "seed": 0,
        "versions": {"vllm": "1"},
        "accelerator": "device",
        "arm": name,
        "layers": name.removeprefix("scx-").replace("plain", ""),
        "secure_device": "cpu",
        "cores": 1,
        "commit": "0123456789abcdef",
        "dirty": False,
        "utc": "2000-01-01T00:00:00+00:00",
        "tasks": tasks,
    }
    return Arm(**(fields | changes))


def save(folder, arm):
    folder.mkdir(parents=True)
    write_arm(arm, folder)
    return folder


def test_an_arm_is_kept_without_the_texts(tmp_path):
    logs = tmp_path / "logs"
    values = {
        "acc,none": 0.5,
        "perplexity,none": 2.0,
        "exact_match,first": 1.0,
        "exact_match,last": 1.0,
    }
    several = {"t": loglikelihood([(-1.0, 1)]), "t_more": generation(["yes, yes"])}
    kept = arm("plain", task_of(logs, values, **several))
    assert [len(task.samples) for task in kept.tasks.values()] == [1, 1]
    file = save(tmp_path / "arm", kept) / "arm.jsonl"
    assert read_arm(file) == kept
    assert acc_logs.PASSAGE in (logs / f"samples_t_{acc_logs.DATE}.jsonl").read_text()
    assert acc_logs.PASSAGE not in file.read_text()
    assert "yes, yes" not in file.read_text()


def test_a_report(tmp_path, capsys):
    values = {"acc,none": 0.5, "perplexity,none": e**2}
    plain, encoded = (
        task_of(tmp_path / name, values, t=loglikelihood(scores))
        for name, scores in (
            ("p", [(-1.0, 1), (-3.0, 0)]),
            ("e", [(-1.0, 1), (-3.25, 0)]),
        )
    )
    folder = tmp_path / "out"
    save(folder / "plain", arm("plain", plain))
    save(folder / "scx-0", arm("scx-0", encoded))
    # One that did not finish, and a plain arm of another type.
    save(folder / ".scx-all.1", arm("scx-all", encoded))
    save(folder / "bfloat16" / "plain", arm("plain", plain, dtype="bfloat16"))
    assert report.main([str(folder), str(folder / "plain")]) == 0
    head, heading, names, _, *rows = (
        line for line in capsys.readouterr().out.splitlines() if line
    )
    assert head == (
        "device, tensor parallel 1, no further arguments; vllm 1; all samples, seed 0; "
        "commit 0123456789"
    )
    assert heading == "t:"
    cells = [[cell.strip() for cell in row.split("|")[1:-1]] for row in [names, *rows]]
    assert cells == [
        [
            *("model", "type", "arm", "acc", "acc, difference"),
            *("perplexity", "perplexity, difference"),
            *("same predictions", "largest log-probability difference"),
        ],
        [
            "model",
            "bfloat16",
            "plain",
            "0.5000 ± 0.5000",
            "",
            "7.3891 ± 8.6836",
            "",
            "",
            "",
        ],
        [
            "model",
            "float32",
            "plain",
            "0.5000 ± 0.5000",
            "",
            "7.3891 ± 8.6836",
            "",
            "",
            "",
        ],
        [
            *("model", "float32", "scx-0", "0.5000 ± 0.5000", "+0 ± 0"),
            # Left out one by one: e^3.25 - e^3 and 0.
            *("7.3891 ± 11.5360", f"+0 ± {(e**3.25 - e**3) / 2:.1g}"),
            *("2 of 2", "2.5e-01"),
        ],
    ]


def refused(folder, capsys):
    with pytest.raises(SystemExit) as exit_:
        report.main([str(folder)])
    assert exit_.value.code == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    return error


@pytest.fixture
def tasks(tmp_path):
    values = {"acc,none": 0.5, "perplexity,none": e**2}
    scores = [(-1.0, 1), (-3.0, 0)]
    return task_of(tmp_path / "logs", values, t=loglikelihood(scores))


def test_an_empty_folder_is_refused(tmp_path, capsys):
    assert "no finished arm in" in refused(tmp_path, capsys)


@pytest.mark.parametrize(
    "changes", [{"limit": 5}, {"versions": {"vllm": "2"}}, {"model": "x"}, {"seed": 1}]
)
def test_unequal_settings_are_not_compared(changes, tasks, tmp_path, capsys):
    save(tmp_path / "1", arm("plain", tasks, **changes))
    save(tmp_path / "2", arm("scx-0", tasks))
    assert "no plain arm to compare scx-0 with: t, model, float32" in refused(
        tmp_path, capsys
    )


def test_other_samples_are_not_compared(tasks, tmp_path, capsys):
    values = {"acc,none": 0.5, "perplexity,none": e**2}
    one = task_of(tmp_path / "1", values, t=loglikelihood([(-1.0, 1)]))
    save(tmp_path / "plain", arm("plain", tasks))
    save(tmp_path / "scx-0", arm("scx-0", one))
    assert "scx-0 and plain answered other samples of t" in refused(tmp_path, capsys)


@pytest.mark.parametrize("damage", ["cut in a line", "cut", "empty", "other"])
def test_a_damaged_arm_is_refused(damage, tasks, tmp_path, capsys):
    file = save(tmp_path / "plain", arm("plain", tasks)) / "arm.jsonl"
    text = file.read_text()
    file.write_text(
        {
            "cut in a line": text[:-20],
            "cut": text[: text.rindex("\n", 0, -1) + 1],
            "empty": "",
            "other": json.dumps({"tasks": {}}),
        }[damage]
    )
    assert "arm.jsonl is no arm of this benchmark" in refused(tmp_path, capsys)


def test_incomplete_logs_are_refused(tmp_path):
    values = {"acc,none": 0.5, "perplexity,none": e**2}
    whole = acc_logs.write(
        tmp_path / "logs", values, t=loglikelihood([(-1.0, 1), (-3.0, 0)])
    )
    (samples,) = whole.glob("samples_*")
    lines = samples.read_text().splitlines(keepends=True)
    samples.write_text(lines[0])
    with pytest.raises(LogError, match="1 samples of t, not 2"):
        read_lm_eval(whole)
    samples.unlink()
    with pytest.raises(LogError, match="0 samples of t, not 2"):
        read_lm_eval(whole)
    (results,) = whole.glob("results_*")
    shutil.copy(results, whole / "results_2.json")
    with pytest.raises(LogError, match="2 files of results"):
        read_lm_eval(whole)
