"""The record of a run on a GPU says what ran, and documents say what the record says."""

import json
import re
import subprocess
import sys

import pytest

from scripts import gpu_tests
from scripts.gpu_tests import BEGIN, DOCS, END, RECORD

FAKE_GPU = """
import torch
torch.cuda.is_available = lambda: True
torch.cuda.device_count = lambda: 1
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
def recorded(tmp_path):
    """Runs tests beside a card that is not there, and reads their record."""
    (tmp_path / "fake_gpu.py").write_text(FAKE_GPU)
    (tmp_path / "test_it.py").write_text(TESTS)
    file = tmp_path / "record.json"

    def run(*options, commit="a" * 40):
        command = [
            sys.executable,
            "-m",
            "pytest",
            "-p",
            "fake_gpu",
            "-p",
            "tests.conftest",
        ]
        command += [f"--rootdir={tmp_path}", f"--record={file}", f"--commit={commit}"]
        path = {"PYTHONPATH": f"{tmp_path}:{DOCS.parent}", "HF_HUB_OFFLINE": "1"}
        subprocess.run(  # noqa: S603
            [*command, *options, str(tmp_path)], env=path, capture_output=True
        )
        return json.loads(file.read_text())

    return run


def test_a_run_is_recorded_as_it_was(recorded):
    record = recorded("-m", "gpu")
    assert record["card"] == "a card"
    assert record["counts"] == {"failed": 2, "passed": 1, "skipped": 1}
    outcomes = {node.split("::")[1]: what for node, what in record["tests"].items()}
    assert outcomes == {
        "test_passes": "passed",
        "test_fails": "failed",
        "test_fails_afterwards": "failed",
        "test_skips": "skipped",
    }


def test_runs_of_one_commit_join(recorded):
    recorded("-k", "passes")
    assert recorded("-k", "fails")["counts"] == {"failed": 2, "passed": 1}
    record = recorded("-k", "needs_none", commit="b" * 40)
    assert record["counts"] == {"passed": 1}


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


def test_every_test_of_the_record_passed(record):
    assert set(record["tests"].values()) == {"passed"}


def test_the_document_says_what_was_recorded(record):
    text = (DOCS / "compatibility.md").read_text()
    assert f"{BEGIN}\n{gpu_tests.summary(record)}\n{END}" in text


def test_each_claim_of_the_document_is_in_the_record(record):
    """A cell that says H100 names a file whose tests ran, or says that it was earlier."""
    files, claims = gpu_tests.by_file(record), 0
    for line in (DOCS / "compatibility.md").read_text().splitlines():
        cell = line.rstrip("| ").rpartition("|")[2] if line.startswith("|") else ""
        for part in cell.split(";"):
            if "H100" in part and "(earlier)" not in part:
                names = re.findall(r"test_\w+\.py", part)
                assert names, part
                assert set(names) & set(files), part
                claims += 1
    assert claims
