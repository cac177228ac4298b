"""The last run of tests on a GPU: its record, and what documents say of it.

    make test-gpu                     records what ran in docs/gpu-tests.json
    python -m scripts.gpu_tests       writes its summary into docs/compatibility.md

A run of some tests joins the record of others if commit, card and versions are the same,
because a host may be lent for less time than all of them take.
"""

import json
from collections import Counter
from datetime import date
from importlib.metadata import version
from pathlib import Path
from typing import Any

DOCS = Path(__file__).parent.parent / "docs"
RECORD = DOCS / "gpu-tests.json"
BEGIN, END = "<!-- gpu-tests -->", "<!-- /gpu-tests -->"


def merge(file: Path, commit: str, outcomes: dict[str, str]) -> None:
    """Write the outcomes of tests (passed, failed or skipped, by node id) to a record."""
    import torch

    setting = {
        "commit": commit,
        "card": torch.cuda.get_device_name(),
        "versions": {name: version(name) for name in ("vllm", "torch")},
    }
    before = json.loads(file.read_text()) if file.exists() else {}
    same = all(before.get(name) == value for name, value in setting.items())
    tests = (before["tests"] if same else {}) | outcomes
    record = setting | {
        "date": date.today().isoformat(),
        "counts": dict(sorted(Counter(tests.values()).items())),
        "tests": dict(sorted(tests.items())),
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
    """What docs/compatibility.md says of a record: one paragraph of Markdown."""
    versions = " and ".join(f"{name} {of}" for name, of in record["versions"].items())
    files = [
        f"{name} ({', '.join(f'{n} {outcome}' for outcome, n in sorted(counts.items()))})"
        for name, counts in by_file(record).items()
    ]
    return (
        f"The last run on a GPU was on {record['date']}, on one {record['card']} with "
        f"{versions}, at commit {record['commit'][:7]}: {'; '.join(files)}."
    )


def insert(text: str, paragraph: str) -> str:
    """The document with this paragraph between its marks."""
    before, rest = text.split(BEGIN)
    _, after = rest.split(END)
    return f"{before}{BEGIN}\n{paragraph}\n{END}{after}"


def main() -> None:
    document = DOCS / "compatibility.md"
    record = json.loads(RECORD.read_text())
    document.write_text(insert(document.read_text(), summary(record)))


if __name__ == "__main__":
    main()
