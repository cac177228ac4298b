"""Reports side by side."""

from scx.audit import report


def finding(layer, attack, share, attacked=10, label="", cut="", adversary="A1"):
    return {
        "layer": layer,
        "adversary": adversary,
        "attack": attack,
        "label": label,
        "share": share,
        "attacked": attacked,
        "cut": cut,
    }


def test_reports_side_by_side():
    known = "known prefix, least squares"
    reports = [
        {
            "codec": "permutation",
            "findings": [
                finding("all", "cached K, V of a layer in the clear", 1.0, 26, cut="26"),
                finding(0, "token equality", 0.994),
                finding(0, "of no headline", 1.0),
            ],
        },
        {
            "codec": "affine",
            "findings": [
                finding(0, "token equality", 0.5),
                finding(0, known, None, 0, "4 tokens", cut="0 of 9"),
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
