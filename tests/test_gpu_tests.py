"""The record of a run on a GPU says what ran, and documents say what the record says."""

import json
import re
import subprocess
import sys

import pytest

from scripts import gpu_tests
from scripts.gpu_tests import BEGIN, DOCS, END, LEFT_OUT, RECORD

FAKE_GPU = """
import torch
torch.cuda.is_available = lambda: {0} > 0
torch.cuda.device_count = lambda: {0}
torch.cuda.get_device_name = lambda: "a card"
"""
TESTS = """
import pytest

@pytest.fixture
def broken():
    yield
    raise OSError

@pytest.mark.gpu
def test_passes(): pass

@pytest.mark.gpu
def test_fails(): assert False

@pytest.mark.gpu
def test_fails_afterwards(broken): pass

@pytest.mark.gpu
def test_skips(): pytest.skip("why")

@pytest.mark.gpu(2)
def test_needs_two(): pass

def test_needs_none(): pass
"""


@pytest.fixture
def pytest_in(tmp_path):
    """Runs pytest on these tests beside a number of cards that are not there."""
    (tmp_path / "test_it.py").write_text(TESTS)

    def run(*options, cards=1):
        (tmp_path / "fake_gpu.py").write_text(FAKE_GPU.format(cards))
        command = [sys.executable, "-m", "pytest", "-p", "fake_gpu", "-p"]
        command += ["tests.conftest", f"--rootdir={tmp_path}", *options, str(tmp_path)]
        path = {"PYTHONPATH": f"{tmp_path}:{DOCS.parent}", "HF_HUB_OFFLINE": "1"}
        return subprocess.run(  # noqa: S603
            command, env=path, capture_output=True, text=True
        )

    return run


@pytest.fixture
def recorded(pytest_in, tmp_path):
    """The record after a run."""
    file = tmp_path / "record.json"

    def run(*options, commit="a" * 40, cards=1):
        pytest_in(f"--record={file}", f"--commit={commit}", *options, cards=cards)
        return json.loads(file.read_text())

    return run


@pytest.mark.parametrize(("cards", "count"), [(0, 5), (1, 1), (2, 0)])
def test_what_needs_more_cards_is_deselected_in_one_line(cards, count, pytest_in):
    output = pytest_in(cards=cards).stdout
    line = (
        f"{count} gpu tests deselected: they need more than the {cards} CUDA devices "
        "here; run them with make test-gpu\n"
    )
    assert (line in output) == bool(count)
    assert (f"{count} deselected" in output) == bool(count)
    assert "collected 6 items" in output
    # The test of six that skips by itself.
    assert ("1 skipped" in output) == bool(cards)


def test_a_run_is_recorded_as_it_was(recorded):
    record = recorded("-m", "gpu")
    assert record["card"] == "a card"
    assert record["counts"] == {"failed": 2, "left out": 1, "passed": 1, "skipped": 1}
    outcomes = {node.split("::")[1]: what for node, what in record["tests"].items()}
    assert outcomes == {
        "test_passes": "passed",
        "test_fails": "failed",
        "test_fails_afterwards": "failed",
        "test_needs_two": "left out",
        "test_skips": "skipped",
    }
    # What was left out took no time.
    names = {node.split("::")[1] for node in record["seconds"]}
    assert names == outcomes.keys() - {"test_needs_two"}


def test_runs_of_one_commit_join(recorded):
    recorded("-k", "passes")
    two = {"failed": 2, "left out": 1, "passed": 1}
    assert recorded("-k", "fails")["counts"] == two
    two = {"failed": 2, "passed": 2}
    assert recorded("-k", "needs_two", cards=2)["counts"] == two
    assert recorded("-k", "passes")["counts"] == two
    record = recorded("-k", "needs_none", commit="b" * 40)
    assert record["counts"] == {"left out": 1, "passed": 1}


def test_a_run_that_cannot_be_collected_is_not_recorded(pytest_in, tmp_path):
    (tmp_path / "test_broken.py").write_text("import nothing_of_this_name")
    file = tmp_path / "record.json"
    assert pytest_in(f"--record={file}", "--commit=a").returncode
    assert not file.exists()


def test_what_git_has_no_commit_of_is_not_recorded(tmp_path, monkeypatch):
    monkeypatch.setattr(gpu_tests, "DOCS", tmp_path / "docs")
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path.parent))
    assert gpu_tests.commit_here() is None

    def git(*command):
        name = ("-c", "user.name=name", "-c", "user.email=email")
        run = ["git", "-C", str(tmp_path), *name, *command]
        return subprocess.check_output(run, text=True)  # noqa: S603

    for file in ("docs/file", "tests/file"):
        (tmp_path / file).parent.mkdir()
        (tmp_path / file).write_text("old")
    git("init", "--quiet")
    git("add", ".")
    git("commit", "--quiet", "--message=message")
    (tmp_path / "docs/file").write_text("new")
    assert gpu_tests.commit_here() == git("rev-parse", "HEAD").strip()
    (tmp_path / "tests/file").write_text("new")
    assert gpu_tests.commit_here() is None


def test_without_a_gpu_nothing_is_recorded(tmp_path):
    file = tmp_path / "record.json"
    run = subprocess.run(  # noqa: S603
        [sys.executable, "-m", "pytest", "--record", str(file), "-m", "gpu"],
        cwd=DOCS.parent,
        env={"CUDA_VISIBLE_DEVICES": ""},
        capture_output=True,
        text=True,
    )
    assert run.returncode == pytest.ExitCode.USAGE_ERROR
    assert run.stderr == "ERROR: --record: no CUDA device here to record a run of\n\n"
    assert not file.exists()


@pytest.fixture
def record():
    return json.loads(RECORD.read_text())


def test_every_test_of_the_record_passed_or_was_left_out(record):
    outcomes = set(record["tests"].values())
    assert "passed" in outcomes
    assert outcomes <= {"passed", LEFT_OUT}


def test_the_document_says_what_was_recorded(record):
    text = (DOCS / "compatibility.md").read_text()
    assert f"{BEGIN}\n{gpu_tests.summary(record)}\n{END}" in text


def test_each_claim_of_the_document_is_in_the_record(record):
    """What a cell with H100 names (files, or tests of one) ran, or it says (earlier)."""
    ran = [node for node, outcome in record["tests"].items() if outcome != LEFT_OUT]
    claims = 0
    for line in (DOCS / "compatibility.md").read_text().splitlines():
        cell = line.rstrip("| ").rpartition("|")[2] if line.startswith("|") else ""
        for part in cell.split(";"):
            if "H100" in part and "(earlier)" not in part:
                names = re.findall(r"test_\w+\.py(?:::\w+)?", part)
                assert names, part
                for name in names:
                    assert any(node.startswith(f"tests/{name}") for node in ran), part
                claims += 1
    assert claims
