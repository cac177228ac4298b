"""That documents hold together: length, links, variables, and figures from files."""

import re
import subprocess
import sys
import unicodedata
from pathlib import Path

import pytest

from scx import keys

ROOT = Path(__file__).parent.parent
DOCS = ROOT / "docs"
DOCUMENTS = sorted([*ROOT.glob("*.md"), *DOCS.rglob("*.md")])
READMES = [ROOT / "README.md", ROOT / "README.zh-CN.md"]
PERFORMANCE = DOCS / "performance.md"
# The first are written by commands, which do not wrap; releases are copied from the last.
WRITTEN = {"permutation.md", "affine.md", "CHANGELOG.md"}
WORDS = 1300
COLUMNS = 100


def name(path):
    return str(path.relative_to(ROOT))


def tables(text):
    """Rows of cells, without heads' rules."""
    lines = [line for line in text.splitlines() if line.startswith("|")]
    return [
        [cell.strip() for cell in line.strip("|").split("|")]
        for line in lines
        if not re.fullmatch(r"[|:\- ]+", line)
    ]


def prose(text):
    """The lines that are neither code nor tables, nor one long word such as a link."""
    kept, code = [], False
    for line in text.splitlines():
        code ^= line.lstrip().startswith("```")
        if not code and not line.startswith(("|", "```")) and " " in line.strip(" -"):
            kept.append(line)
    return kept


def anchors(text):
    """Of the headings, as GitHub makes them."""
    headings = re.findall(r"(?m)^#+ (.+)$", re.sub(r"(?ms)^```.*?^```", "", text))
    return {re.sub(r"[^\w\- ]", "", each.lower()).replace(" ", "-") for each in headings}


def words(text):
    """As `wc -w` counts, and a word for every two Chinese characters."""
    chinese = re.compile(r"[\u3400-\u9fff]")
    plain = re.sub(r"[\u3000-\u303f\uff00-\uffef]", " ", chinese.sub(" ", text))
    return len(plain.split()) + len(chinese.findall(text)) // 2


def width(line):
    return sum(1 + (unicodedata.east_asian_width(each) in "WF") for each in line)


@pytest.mark.parametrize("path", READMES, ids=name)
def test_a_readme_is_short(path):
    assert words(path.read_text()) <= WORDS


def test_chinese_is_counted_by_pairs_of_characters():
    assert words("one `two` three") == 3
    assert words("安全设备\uff0ccpu\u3002") == 3


@pytest.mark.parametrize("path", DOCUMENTS, ids=name)
def test_links_lead_somewhere(path):
    for target in re.findall(r"\]\(([^)\s]+)\)", path.read_text()):
        if re.match(r"[a-z]+:", target):
            continue
        file, _, anchor = target.partition("#")
        there = path.parent / file if file else path
        assert there.exists(), target
        assert not anchor or anchor in anchors(there.read_text()), target


@pytest.mark.parametrize("path", DOCUMENTS, ids=name)
def test_paths_that_documents_name_exist(path):
    folders = "scx|tests|docs|scripts|data|benchmark_throughput|benchmark_acc|lab"
    named = re.findall(rf"`((?:{folders})/[\w./-]*\w\.\w+)`", path.read_text())
    for each in named:
        assert "NAME" in each or (ROOT / each).exists(), each


@pytest.mark.parametrize("path", READMES, ids=name)
def test_readmes_have_the_variables_that_are_read(path):
    assert set(re.findall(r"SCX_[A-Z_]+\w", path.read_text())) == set(keys.VARIABLES)


def test_documents_name_no_other_variable():
    for path in DOCUMENTS:
        if path.name != "CHANGELOG.md":
            named = set(re.findall(r"SCX_[A-Z_]*[A-Z]", path.read_text()))
            assert named <= set(keys.VARIABLES), path


def commands(text):
    """The blocks of a language, without comments."""
    blocks = re.findall(r"(?ms)^```\w+\n(.*?)^```", text)
    return [re.sub(r" *#.*", "", block) for block in blocks]


def figures(text):
    number = re.compile(r"\d[\d.,x()+%]*\d%?")
    return [number.findall(" ".join(row)) for row in tables(text)]


def test_the_readmes_say_the_same():
    english, chinese = (path.read_text() for path in READMES)
    levels = re.compile(r"(?m)^(#+) ")
    assert levels.findall(english) == levels.findall(chinese)
    assert commands(english) == commands(chinese)
    assert figures(english) == figures(chinese)


WRAPPED = [path for path in DOCUMENTS if path.name not in WRITTEN]


@pytest.mark.parametrize("path", WRAPPED, ids=name)
def test_prose_is_wrapped(path):
    assert [line for line in prose(path.read_text()) if width(line) > COLUMNS] == []


def test_shares_in_readmes_are_of_the_audit():
    audit = " ".join(path.read_text() for path in (DOCS / "audit").glob("*.md"))
    for path in (*READMES, ROOT / "SECURITY.md"):
        for share in re.findall(r"\d+\.\d+%", path.read_text()):
            assert f" {share}" in audit, (path, share)


def speeds():
    """Label and cells of the rows with four ratios."""
    cell = re.compile(r"\d\.\d{3} \(\d\.\d{3} to \d\.\d{3}\)")
    rows = tables(PERFORMANCE.read_text())
    return {row[0]: row[1:] for row in rows if all(map(cell.fullmatch, row[1:]))}


def rows_of_records():
    """What the benchmark reports of all records: name of the table, and the cells of the
    four workloads, None where one is missing."""
    files = (ROOT / "benchmark_throughput" / "results").glob("*-h100-*.jsonl")
    report = subprocess.run(  # noqa: S603
        [
            *(sys.executable, "-m", "benchmark_throughput.compare", "--markdown"),
            *("--report", *map(str, sorted(files))),
        ],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    table, head, found = "", [], []
    for row in tables(report):
        if "mixed" in " ".join(row):
            table, head = row[0], [workload.split()[0] for workload in row[1:]]
        cells = dict(zip(head, row[1:], strict=False))
        workloads = ("mixed", "prefill", "decode1", "decode64")
        found.append((table, [cells.get(workload) for workload in workloads]))
    return found


def test_speeds_and_cores_are_those_of_the_records():
    measured = rows_of_records()
    assert speeds()
    for label, cells in speeds().items():
        assert ("throughput", cells) in measured, label
    busy = [
        [f"{float(cell):.1f}" for cell in cells]
        for table, cells in measured
        if table == "CPU cores" and None not in cells and cells[0][0].isdigit()
    ]
    assert cores()
    for label, cells in cores().items():
        assert cells in busy, label


def cores():
    """Label and cells of the rows of busy cores."""
    rows = tables(PERFORMANCE.read_text())
    return {
        row[0]: row[1:]
        for row in rows
        # Tables of microseconds begin with a number of tokens.
        if row[0][0].isalpha() and all(re.fullmatch(r"\d+\.\d", x) for x in row[1:])
    }


def test_speeds_and_cores_in_readmes_are_of_those_tables():
    known = {
        label: [cell.split()[0] for cell in cells] for label, cells in speeds().items()
    }
    busy = {
        label: f"{min(cells, key=float)} to {max(cells, key=float)}"
        for label, cells in cores().items()
    }
    quoted = ratios_in_readme()
    assert len(quoted) == 5
    for label, *ratios, range_of_cores in quoted:
        assert ratios == known[label]
        assert range_of_cores == busy[label]
    assert f"cores (native {busy['native']})" in READMES[0].read_text()


def ratios_in_readme():
    rows = tables(READMES[0].read_text())
    return [row for row in rows if re.fullmatch(r"\d\.\d{3}", row[1])]
