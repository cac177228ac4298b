"""The last run of tests on a GPU: its record, and what documents say of it.

    make test-gpu                     records what ran in docs/gpu-tests.json
    python -m scripts.gpu_tests       writes its summary into docs/compatibility.md

A run of some tests joins the record of others if commit, card and versions are the same,
because a host may be lent for less time than all of them take.
"""

import json
import subprocess
import textwrap
from collections import Counter
from datetime import date
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest
import torch

DOCS = Path(__file__).parent.parent / "docs"
RECORD = DOCS / "gpu-tests.json"
BEGIN, END = "<!-- gpu-tests -->", "<!-- /gpu-tests -->"
LEFT_OUT = "left out"
"""What became of a test for which there were too few CUDA devices."""


def devices_for(item: pytest.Item) -> int:
    """How many CUDA devices a test needs."""
    marker = item.get_closest_marker("gpu")
    return max([*marker.args, 1]) if marker else 0


def commit_here() -> str | None:
    """The commit of this tree; None without git, or if it differs outside docs/."""
    git = ["git", "-C", str(DOCS.parent)]
    changes = [*git, "diff", "--quiet", "HEAD", "--", ".", ":!docs"]
    try:
        subprocess.run(changes, check=True, capture_output=True)  # noqa: S603
        head = [*git, "rev-parse", "HEAD"]
        return subprocess.check_output(head, text=True).strip()  # noqa: S603
    except (OSError, subprocess.CalledProcessError):
        return None


class Recorder:
    """A plugin of pytest that notes what becomes of each test, by node id, and adds that
    to the record in `file` once they have ended."""

    def __init__(self, file: Path, commit: str) -> None:
        self._file, self._commit = file, commit
        self._outcomes: dict[str, str] = {}
        self._seconds: dict[str, float] = {}

    def pytest_deselected(self, items: list[pytest.Item]) -> None:
        here = torch.cuda.device_count()
        for item in items:
            if devices_for(item) > here:
                self._outcomes[item.nodeid] = LEFT_OUT

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        """The worst outcome of a test's setup, call and teardown, and their seconds."""
        node = report.nodeid
        self._seconds[node] = self._seconds.get(node, 0) + report.duration
        says = report.when == "call" or report.outcome != "passed"
        if says and self._outcomes.get(node) != "failed":
            self._outcomes[node] = report.outcome

    def pytest_sessionfinish(self) -> None:
        # None ran if a file could not be collected.
        if self._seconds:
            merge(self._file, self._commit, self._outcomes, self._seconds)


def merge(
    file: Path, commit: str, outcomes: dict[str, str], seconds: dict[str, float]
) -> None:
    """Write what became of tests (passed, failed, skipped or left out) to a record."""
    setting = {
        "commit": commit,
        "card": torch.cuda.get_device_name(),
        "versions": {name: version(name) for name in ("vllm", "torch")},
    }
    before = json.loads(file.read_text()) if file.exists() else {}
    if any(before.get(name) != value for name, value in setting.items()):
        before = {"tests": {}, "seconds": {}}
    # A test that is left out here may have run beside more devices.
    ran = {node: outcome for node, outcome in outcomes.items() if outcome != LEFT_OUT}
    tests = outcomes | before["tests"] | ran
    taken = before["seconds"] | {node: round(s, 1) for node, s in seconds.items()}
    record = setting | {
        "date": date.today().isoformat(),
        "counts": dict(sorted(Counter(tests.values()).items())),
        "tests": dict(sorted(tests.items())),
        "seconds": dict(sorted(taken.items())),
    }
    file.write_text(json.dumps(record, indent=1) + "\n")


def by_file(record: dict[str, Any]) -> dict[str, Counter[str]]:
    """The outcomes of each file's tests, by the file's name."""
    files: dict[str, Counter[str]] = {}
    for node, outcome in record["tests"].items():
        name = Path(node.partition("::")[0]).name
        files.setdefault(name, Counter())[outcome] += 1
    return files


def summary(record: dict[str, Any]) -> str:
    """What docs/compatibility.md says of a record: a paragraph of Markdown."""
    versions = " and ".join(f"{name} {of}" for name, of in record["versions"].items())
    files = [
        f"{name} ({', '.join(f'{n} {outcome}' for outcome, n in sorted(counts.items()))})"
        for name, counts in by_file(record).items()
    ]
    paragraph = (
        f"The last run on a GPU was on {record['date']}, on {record['card']} with "
        f"{versions}, at commit {record['commit'][:7]}: {'; '.join(files)}."
    )
    return textwrap.fill(paragraph, 100, break_on_hyphens=False)


def insert(text: str, part: str, begin: str = BEGIN, end: str = END) -> str:
    """The document with this part between its marks."""
    before, rest = text.split(begin)
    _, after = rest.split(end)
    return f"{before}{begin}\n{part}\n{end}{after}"


def main() -> None:
    document = DOCS / "compatibility.md"
    record = json.loads(RECORD.read_text())
    document.write_text(insert(document.read_text(), summary(record)))


if __name__ == "__main__":
    main()
