"""The table of vLLM versions, and that the package says no more than it does."""

import json
import re

import pytest

from benchmark_throughput.records import read_records
from scripts import architectures, compatibility
from scripts.compatibility_probe import CHECKS, verdict
from scx.plugin import versions

PASSED = dict.fromkeys(CHECKS, "pass")
VERSIONS = {"vllm": "0.32.0+cpu", "torch": "2.13.0+cpu", "transformers": "5.16.1"}


def entry(vllm, **found):
    return {"vllm": vllm, "date": "2026-11-24"} | found


def tables(text):
    """The cells of each row, and the notes."""
    lines = text.splitlines()
    rows = [
        re.split(r" +\| +", line.strip("| ")) for line in lines if line.startswith("| 0.")
    ]
    return rows, [line for line in lines if line.startswith("- ")]


def test_the_table_says_what_passed_and_what_was_said():
    rows = [
        entry("0.32.0", versions=VERSIONS, checks=PASSED),
        entry("0.31.0", versions=VERSIONS, checks=PASSED | {"refusal": "not refused"}),
        entry("0.11.2", error="no torch==2.8.0+cpu"),
    ]
    text = compatibility.markdown(rows)
    table, notes = tables(text)
    every = len(CHECKS)
    assert table == [
        ["0.32.0", "2.13.0+cpu", "5.16.1", *["pass"] * every, "2026-11-24"],
        ["0.31.0", "2.13.0+cpu", "5.16.1", *["pass"] * (every - 1), "fail", "2026-11-24"],
    ]
    assert notes == ["- 0.31.0, refusal: not refused"]
    unknown = text.partition("There is no verdict")[2].splitlines()[-1]
    assert unknown == "0.11.2."
    assert [compatibility.works(row) for row in rows] == [True, False, False]


def test_a_new_row_replaces_its_versions_old_one():
    rows = []
    for vllm in ("0.9.2", "0.11.2", "0.32.0", "0.11.2"):
        rows = compatibility.merge(rows, entry(vllm, error=str(len(rows))))
    assert [row["vllm"] for row in rows] == ["0.32.0", "0.11.2", "0.9.2"]
    assert rows[1]["error"] == "3"


@pytest.mark.parametrize(
    ("native", "encoded", "expected"),
    [
        ({"tokens": [[1], [2]]}, {"tokens": [[1], [2]], "encoded": 2}, "pass"),
        (
            {"tokens": [[1], [2]]},
            {"tokens": [[1], [3]], "encoded": 2},
            "in 1 of 2 prompts",
        ),
        ({"tokens": [[1]]}, {"tokens": [[1]], "encoded": 0}, "0 of 2 in the encoded"),
        ({"tokens": [[1]]}, {"error": "E: no"}, "E: no"),
        ({"error": "E: no"}, {"error": "E: other"}, "vLLM itself: E: no"),
    ],
)
def test_the_verdict_on_a_pair_of_engines(native, encoded, expected):
    assert expected in verdict({"encoded": 0} | native, encoded)


def versions_on_gpus():
    """Those with which a committed benchmark ran encoded engines on a GPU."""
    files = (compatibility.REPOSITORY / "benchmark_throughput" / "results").glob(
        "*.jsonl"
    )
    return {
        record.versions["vllm"]
        for file in files
        for record in read_records(file)
        if record.crossed_bytes and "NVIDIA" in record.accelerator
    }


def test_the_versions_that_are_not_warned_of_are_those_that_ran():
    rows = json.loads((compatibility.DOCS / "versions.json").read_text())
    worked = {
        row["vllm"] for row in rows if compatibility.works(row)
    } | versions_on_gpus()
    minors = {tuple(compatibility.key(vllm)[:2]) for vllm in worked}
    assert tuple(f"{major}.{minor}" for major, minor in sorted(minors)) == versions.RUN


def test_the_declared_range_begins_with_the_first_of_them_and_has_no_end():
    project = (compatibility.REPOSITORY / "pyproject.toml").read_text()
    declared = re.search(r'^    "vllm([^"]+)",$', project, re.MULTILINE)[1]
    assert declared == f">={versions.RUN[0]}"


def test_an_engine_of_a_version_that_was_never_run_is_warned_of(monkeypatch):
    assert versions.unknown() == ""
    monkeypatch.setattr(versions, "version", lambda name: "0.99.1+cpu")
    assert versions.unknown().startswith("vllm 0.99.1+cpu was never run")


def test_the_table_is_the_files():
    rows = json.loads((compatibility.DOCS / "versions.json").read_text())
    text = (compatibility.DOCS / "versions.md").read_text()
    assert text == compatibility.markdown(rows)


def test_the_architectures_that_are_listed_are_those_of_the_package():
    text = (compatibility.DOCS / "compatibility.md").read_text()
    listed = f"{architectures.BEGIN}\n\n{architectures.table()}\n\n{architectures.END}"
    assert listed in text
