"""Reports side by side."""

import json
from pathlib import Path

from scx.audit import report

ROOT = Path(__file__).parent.parent
REPORTS = [
    ROOT / "docs" / "audit" / f"{codec}.json" for codec in ("permutation", "affine")
]


def finding(layer, attack, share, attacked=30, label="", adversary="A1", **more):
    return {
        "layer": layer,
        "adversary": adversary,
        "attack": attack,
        "label": label,
        "given_text": False,
        "about": "tokens of a request",
        "share": share,
        "attacked": attacked,
        "of": 30,
        "cut": "",
    } | more


KNOWN = "known prefix, least squares"
MADE = [
    {
        "codec": "permutation",
        "layers": [0],
        "findings": [
            finding("all", "cached K, V of a layer in the clear", 1.0, 26),
            finding(0, "token equality", 0.994, about="pairs of equal tokens"),
            finding(0, "of no headline", 1.0),
        ],
    },
    {
        "codec": "affine",
        "layers": [0, 3],
        "findings": [
            finding(0, "token equality", 0.5),
            finding(0, KNOWN, None, 0, "4 tokens", given_text=True),
            finding(0, KNOWN, 0.75, 20, "8 tokens", given_text=True),
            finding(3, "map", 0.25, about="cached vectors decoded", adversary="A2"),
            finding(3, "batch of one", 1.0, adversary="A2"),
        ],
    },
]


def cells(table):
    return [[c.strip() for c in line.split("|")[1:-1]] for line in table.splitlines()]


def test_attacks_side_by_side():
    head, _, *lines = cells(report.comparison(MADE))
    assert head == [
        "",
        "attack",
        *("permutation, layers in the clear", "affine, layers in the clear"),
        *("permutation, layer 0", "affine, layer 0"),
        *("permutation, layer 3", "affine, layer 3"),
    ]
    assert lines == [
        ["A1", "token equality", "", "", "99.4%", "50.0%", "", ""],
        ["A1", f"{KNOWN}: 4 tokens", "", "", "", "-", "", ""],
        ["A1", f"{KNOWN}: 8 tokens", "", "", "", "75.0% of 20", "", ""],
        ["A2", "batch of one", "", "", "", "", "", "100.0%"],
        ["A1", "cached K, V of a layer in the clear", "100.0% of 26", *[""] * 5],
    ]


def test_the_most_by_adversary_and_by_what_it_knows():
    head, _, *lines = cells(report.overview(MADE))
    assert head == ["", "A1, no text known", "A1, some text known", "A2", "A3"]
    both = "tokens 100.0%; K, V 25.0%"
    assert lines == [
        ["permutation, layer 0", *["tokens 100.0%"] * 4],
        ["permutation, layers in the clear", *["tokens 100.0% of 26"] * 4],
        ["affine, layer 0", "tokens 50.0%", *["tokens 75.0% of 20"] * 3],
        ["affine, layer 3", "-", "-", both, both],
        ["affine, layers in the clear", *["-"] * 4],
    ]


def test_tables_are_put_where_a_document_marks_them():
    document = "before\n<!-- one -->\nold\nlines\n<!-- end -->\nafter\n<!-- end -->\n"
    made = report.put(document, {"one": r"| \1 |", "two": "nowhere"})
    assert made == "before\n<!-- one -->\n| \\1 |\n<!-- end -->\nafter\n<!-- end -->\n"


def test_the_document_has_the_tables_of_the_committed_reports():
    tables = report.tables([json.loads(file.read_text()) for file in REPORTS])
    text = (ROOT / "docs" / "audit" / "README.md").read_text()
    assert all(f"<!-- {name} -->\n{table}\n" in text for name, table in tables.items())
