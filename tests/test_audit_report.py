"""Reports side by side."""

import json
from pathlib import Path

from scx.audit import report

ROOT = Path(__file__).parent.parent


def finding(layer, attack, share, attacked=30, label="", adversary="A1"):
    return {
        "layer": layer,
        "adversary": adversary,
        "attack": attack,
        "label": label,
        "share": share,
        "attacked": attacked,
        "of": 30,
    }


def test_reports_side_by_side():
    known = "known prefix, least squares"
    reports = [
        {
            "codec": "permutation",
            "findings": [
                finding("all", "cached K, V of a layer in the clear", 1.0, 26),
                finding(0, "token equality", 0.994),
                finding(0, "of no headline", 1.0),
            ],
        },
        {
            "codec": "affine",
            "findings": [
                finding(0, "token equality", 0.5),
                finding(0, known, None, 0, "4 tokens"),
                finding(3, "batch of one", 1.0, adversary="A2"),
            ],
        },
    ]
    lines = report.comparison(reports).splitlines()
    table = [[cell.strip() for cell in line.split("|")[1:-1]] for line in lines]
    assert table[0] == [
        "",
        "attack",
        *("permutation, any layer", "affine, any layer"),
        *("permutation, layer 0", "affine, layer 0"),
        *("permutation, layer 3", "affine, layer 3"),
    ]
    assert table[2:] == [
        ["A1", "token equality", "", "", "99.4%", "50.0%", "", ""],
        ["A1", f"{known}: 4 tokens", "", "", "", "-", "", ""],
        ["A2", "batch of one", "", "", "", "", "", "100.0%"],
        ["A1", "cached K, V of a layer in the clear", "100.0% of 26", *[""] * 5],
    ]


def test_the_readmes_have_the_table_of_the_committed_reports():
    names = ("permutation", "affine")
    files = [ROOT / "docs" / "audit" / f"{name}.json" for name in names]
    table = report.comparison([json.loads(file.read_text()) for file in files])
    for readme in ("README.md", "README.zh-CN.md"):
        assert table in (ROOT / readme).read_text()
