"""The evaluation's scripts: what they accept, what they leave, and one real run."""

import os
import re
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from benchmark_acc import demo_results, evaluation, report, run_eval
from benchmark_acc.evaluation import Plan, run_arm
from benchmark_acc.logs import FILE, LogError, Setting, read_arm
from benchmark_acc.tasks import passages
from lab import tiny_models
from lab.cli import UsageError
from lab.engines import in_new_process
from lab.processes import ArmFailed
from scx.commands.demo_model import embedded_model
from tests import acc_logs

ROOT = Path(__file__).parent.parent
SCRIPTS = sorted((ROOT / "benchmark_acc").glob("run_eval_*.sh"))
PLAN = Plan(
    model="model",
    tasks=["t"],
    setting=Setting(
        model="model",
        dtype="float32",
        tensor_parallel_size=1,
        model_args="",
        limit=None,
        seed=0,
        versions={},
        accelerator="device",
    ),
    secure_device="cpu",
    codec="permutation",
    provenance={"cores": 1, "commit": None, "dirty": None},
)


def test_the_scripts_are_the_promised_ones():
    names = [path.name for path in SCRIPTS]
    assert names == [f"run_eval_{size}.sh" for size in ("1.5b", "70b", "7b")]
    assert all(os.access(path, os.X_OK) for path in SCRIPTS)


@pytest.fixture
def variables(monkeypatch):
    """Those of a run on the embedded model, to be changed."""
    monkeypatch.setenv("MODEL_PATH", str(embedded_model()))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    for name in ("ARMS", "LIMIT", "TP", "DTYPE", "SEED", "MODEL_ARGS", "SCX_ENC_LAYERS"):
        monkeypatch.delenv(name, raising=False)
    return monkeypatch


@pytest.mark.parametrize(
    ("name", "value", "said"),
    [
        ("MODEL_PATH", "", "MODEL_PATH='': allowed is a model's folder or hub name"),
        ("MODEL_PATH", "/nowhere", "MODEL_PATH='/nowhere': no model's folder, and none"),
        ("MODEL_PATH", "no/model", "MODEL_PATH='no/model': no model's folder, and none"),
        ("ARMS", "native", "ARMS='native': allowed is plain, scx, both"),
        ("LIMIT", "0.5", "LIMIT='0.5': allowed is a whole number from 1"),
        ("TP", "0", "TP='0': allowed is a whole number from 1"),
        ("SEED", "-1", "SEED='-1': allowed is a whole number from 0"),
        ("DTYPE", "float 32", "DTYPE='float 32': allowed is a type"),
        ("SCX_ENC_LAYERS", "0,30", "SCX_ENC_LAYERS='30': this model has the layers 0 to"),
        ("SCX_ENC_LAYERS", "first", "SCX_ENC_LAYERS='first': comma-separated"),
        ("SCX_SECURE_DEVICE", "moon", "SCX_SECURE_DEVICE='moon': a torch device"),
    ],
)
def test_a_bad_variable_is_one_line(name, value, said, variables, capsys, tmp_path):
    variables.setenv(name, value)
    assert run_eval.main(["pydoc", str(tmp_path)]) == 2
    error = capsys.readouterr().err
    assert said in error
    assert error.count("\n") == 1
    assert not any(tmp_path.iterdir())


def test_a_model_without_a_number_of_layers_is_one_line(variables, capsys, tmp_path):
    folder = tiny_models.save_config(
        tmp_path / "m", "LlamaForCausalLM", "llama", num_hidden_layers=None
    )
    variables.setenv("MODEL_PATH", str(folder))
    assert run_eval.main(["pydoc", str(tmp_path / "out")]) == 2
    error = capsys.readouterr().err
    assert f"MODEL_PATH='{folder}': no model's folder, and none from the hub" in error
    assert error.count("\n") == 1


def test_paths_that_cannot_be_are_one_line(variables, capsys, tmp_path):
    (tmp_path / "file").touch()
    assert run_eval.main(["pydoc", str(tmp_path / "file")]) == 2
    assert "run_eval: [Errno 20] Not a directory" in capsys.readouterr().err
    assert run_eval.main(["../pydoc", str(tmp_path)]) == 2
    assert "TASK '../pydoc': a name without / is needed" in capsys.readouterr().err


def test_a_missing_argument_is_one_line(tmp_path):
    run = subprocess.run(  # noqa: S603
        [str(SCRIPTS[0]), "pydoc"],
        env={**os.environ, "PYTHON": sys.executable},
        capture_output=True,
        text=True,
        cwd=tmp_path,
    )
    assert run.returncode == 2
    assert run.stderr.startswith("run_eval: two arguments are needed, TASK OUTDIR")
    assert run.stderr.count("\n") == 1


def test_the_arms_and_their_layers(variables, tmp_path):
    done = []
    variables.setattr(run_eval, "run_arm", lambda plan, *rest: done.append((plan, *rest)))
    variables.setenv("LIMIT", "7")
    run_eval.run_eval("pydoc,other", tmp_path)
    variables.setenv("ARMS", "scx")
    for layers in ("all", "3,1"):
        variables.setenv("SCX_ENC_LAYERS", layers)
        run_eval.run_eval("pydoc", tmp_path)
    model = embedded_model().name
    assert [(layers, folder) for _, layers, folder in done] == [
        ("", tmp_path / "pydoc,other" / model / "plain"),
        ("0,29", tmp_path / "pydoc,other" / model / "scx-0,29"),
        ("all", tmp_path / "pydoc" / model / "scx-all"),
        ("1,3", tmp_path / "pydoc" / model / "scx-1,3"),
    ]
    plan = done[0][0]
    assert plan.tasks == ["pydoc", "other"]
    assert (plan.setting.limit, plan.setting.dtype) == (7, "bfloat16")
    assert {"vllm", "lm-eval", "scx-vllm"} <= plan.setting.versions.keys()
    other = replace(plan, secure_device="cuda:1", codec="affine")
    assert run_eval.arm_name("0", other) == "scx-0@cuda:1+affine"


@pytest.fixture
def evaluate(monkeypatch):
    return lambda function: monkeypatch.setattr(evaluation, "evaluate", function)


def test_a_finished_arm_replaces_an_earlier_one(evaluate, tmp_path):
    evaluate(acc_logs.write_whole)
    folder = tmp_path / "t" / "model" / "scx-0"
    folder.mkdir(parents=True)
    (folder / "earlier").touch()
    run_arm(PLAN, "0", folder)
    arm = read_arm(folder / FILE)
    assert (arm.arm, arm.layers, arm.setting) == ("scx-0", "0", vars(PLAN.setting))
    assert arm.tasks["t"].samples[0].scores == {"acc,none": 1, "perplexity,none": -1.0}
    assert len(list(folder.iterdir())) == 3
    assert list(folder.parent.iterdir()) == [folder]


@pytest.mark.parametrize(
    ("function", "error", "said"),
    [
        (acc_logs.write_half, LogError, "0 samples of t, not 1"),
        (acc_logs.write_and_fail, ArmFailed, "^ValueError: and the last$"),
        (acc_logs.write_and_die, ArmFailed, "its process ended with status 3"),
        (acc_logs.write_and_refuse, UsageError, "^no such thing$"),
    ],
)
def test_an_arm_that_fails_leaves_nothing(function, error, said, evaluate, tmp_path):
    folder = tmp_path / "plain"
    folder.mkdir()
    (folder / "earlier").touch()
    evaluate(function)
    with pytest.raises(error, match=said):
        run_arm(PLAN, "", folder)
    assert list(tmp_path.iterdir()) == [folder]
    assert list(folder.iterdir()) == [folder / "earlier"]


@pytest.fixture
def ignored_interrupts():
    """As a script's commands have them that it starts with `&`."""
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    yield
    assert signal.signal(signal.SIGINT, before) is signal.SIG_IGN


@pytest.mark.usefixtures("ignored_interrupts")
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_an_interrupted_arm_leaves_nothing(number, evaluate, variables, tmp_path, capsys):
    evaluate(acc_logs.start_another_and_wait)
    pids = tmp_path / "pids"
    killer = "while [ ! -e $0 ]; do sleep 0.1; done; kill -$1 $2"
    with subprocess.Popen(  # noqa: S603
        ["timeout", "60", "bash", "-c", killer, pids, str(int(number)), str(os.getpid())]  # noqa: S607
    ):
        status = run_eval.exit_status(lambda: run_arm(PLAN, "", tmp_path / "plain"))
    assert status == 130
    assert "interrupted" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == [pids]
    for pid in pids.read_text().split():
        with pytest.raises(ProcessLookupError):
            os.kill(int(pid), 0)


def test_the_passages():
    found = passages.passages()
    assert found == passages.passages()
    assert len(found) > 200
    assert len({passage["text"] for passage in found}) == len(found)
    for passage in found:
        assert re.fullmatch("[a-z]{3,}", passage["word"])
        assert len(passage["text"].split()) + 1 in passages.WORDS
        assert "  " not in passage["text"]
    # The order is drawn, not that of the topics.
    assert found != sorted(found, key=lambda passage: passage["text"])


@pytest.mark.parametrize(
    ("paragraph", "split"),
    [
        ("One two. Three four.", None),
        (f"{'Word ' * 15}ends here. And Then.", ("Word " * 15 + "ends", "here")),
        (f"{'Word ' * 15}ends\nhere.", ("Word " * 15 + "ends", "here")),
        (f"{'Word ' * 15}ends in code().", None),
        (f"{'Word ' * 50}ends.", None),
        (f"{'Word ' * 15}\n   indented code.", None),
    ],
)
def test_the_last_word(paragraph, split):
    assert passages.last_word(paragraph) == split


def refusals(names):
    import lm_eval.tasks

    # Made once: to read all of lm-eval's tasks takes seconds.
    manager = lm_eval.tasks.TaskManager()
    lm_eval.tasks.TaskManager = lambda **_: manager
    said = []
    for name in names:
        try:
            evaluation.load_tasks([name])
        except UsageError as error:
            said.append(str(error))
    return said


def test_tasks_that_cannot_be_had():
    # Offline is set there; a hub that is not reached ends in the same exception.
    unknown, unreached = in_new_process(refusals, ["nonesuch", "lambada_openai"])
    assert unknown.startswith("TASK 'nonesuch': lm-eval has none of that name")
    assert unreached.startswith("TASK 'lambada_openai': its data cannot be had (")
    for line in (unknown, unreached):
        assert "\n" not in line
        assert "pydoc needs no hub" in line


def test_a_real_run(tmp_path, capsys):
    """Both arms of a real model: in float32 the answers are the same."""
    model = embedded_model()
    variables = {
        "PYTHON": sys.executable,
        "MODEL_PATH": str(model),
        "DTYPE": "float32",
        "LIMIT": "3",
        "MODEL_ARGS": "enforce_eager=True,max_model_len=256",
        "VLLM_CPU_KVCACHE_SPACE": "1",
    }
    run = subprocess.run(  # noqa: S603
        [str(SCRIPTS[0]), "pydoc", "out"],
        env={**os.environ, **variables, "SCX_ENC_LAYERS": ""},
        capture_output=True,
        text=True,
        cwd=tmp_path,
    )
    assert run.returncode == 0, run.stderr
    folder = tmp_path / "out" / "pydoc" / model.name
    assert {path.name for path in folder.iterdir()} == {"plain", "scx-0,29"}
    for path in folder.iterdir():
        names = sorted(re.sub(r"_\d{4}-.*\.", ".", each.name) for each in path.iterdir())
        samples = ["samples_pydoc_continuation.jsonl", "samples_pydoc_last_word.jsonl"]
        assert names == [FILE, "results.json", *samples]
    plain, encoded = (read_arm(folder / name / FILE) for name in ("plain", "scx-0,29"))
    words, texts = (
        report.agreement(encoded.tasks[name], plain.tasks[name])
        for name in ("pydoc_last_word", "pydoc_continuation")
    )
    # Another order of sums over a head's features: some 1e-6 of a logit's size, 20.
    assert words.largest_difference < 1e-3
    assert words.same_predictions == 3
    assert texts == report.Agreement(3, 3, 3, None)
    assert report.main([str(folder)]) == 0
    assert "| 3 of 3 " in capsys.readouterr().out


def test_the_results_are_of_this_command_and_in_the_readme(monkeypatch, tmp_path):
    """Arms that are there are of those that the command makes, and not made again."""
    results = ROOT / "benchmark_acc" / "results"
    setting = read_arm(next(results.rglob(FILE))).setting

    def plan(model, task, **chosen):
        known = {"versions": setting["versions"], "accelerator": setting["accelerator"]}
        return replace(PLAN, setting=Setting(model=Path(model).name, **known, **chosen))

    made = []
    monkeypatch.setattr(demo_results, "make_plan", plan)
    monkeypatch.setattr(demo_results, "run_arm", lambda *args: made.append(args))
    demo_results.evaluate_all(results)
    again = {folder.relative_to(results) for _, _, folder in made}
    made.clear()
    demo_results.evaluate_all(tmp_path)
    everything = {folder.relative_to(tmp_path) for _, _, folder in made}
    there = {path.parent.relative_to(results) for path in results.rglob(FILE)}
    assert there <= everything
    assert again == everything - there
    # The tables of docs/accuracy.md are what the report says of them.
    rows = report.report(report.find_arms([results])).splitlines()
    document = (ROOT / "docs" / "accuracy.md").read_text()
    for row in (row for row in rows if row.startswith("| smollm2")):
        cells = [cell.strip() for cell in row.strip("|").split("|")]
        cells[0] = cells[0].removeprefix("smollm2-135m-")
        assert f"| {' | '.join(cells)} |" in document
