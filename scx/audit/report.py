"""An audit's report: a table on the terminal, Markdown, JSON.

    python -m scx.audit.report docs/audit/*.json --into docs/audit/README.md

puts the tables of several reports, side by side, into documents, between the comments
that name them; without `--into` it prints them.
"""

import argparse
import json
import re
from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from scx.audit.interface import WHOLE_MODEL, About

WHO = {
    "A1": "reads KV cache blocks",
    "A2": "reads A1's and all that crosses for the encoded layers",
    "A3": "reads all of the accelerator's memory",
}
NOTES = (
    "All know the weights. An attack stands under the weakest adversary that can run it. "
    "Chance is what blind guessing reaches. The controls are the same attack on random "
    "tensors of that shape, and with other weights; a dash is one that cannot be had."
)
HEADLINES = (
    "dictionary of sorted values",
    "dictionary of head norms",
    "token equality",
    "known prefix, least squares: 4 tokens",
    "known prefix, least squares: 8 tokens",
    "known prefix, least squares: 16 tokens",
    "known prefix, least squares: 128 tokens",
    "map from a known prefix: 65 tokens",
    "map from a known prefix: 96 tokens",
    "map from a known prefix: 128 tokens",
    "another tenant's known plaintext",
    "moments, whitened head norms",
    "vocabulary matching, D (cached K, V)",
    "vocabulary matching, SD (cached K, V)",
    "KV collision, sorted",
    "row order, by comparing bytes",
    "map from one step at the border",
    "map from one step at the border, then matching",
    "linking the two views of V: rows, in a batch",
    "linking the two views of V: features",
    "batch of one",
    "vocabulary matching, S (qkv_proj input)",
    "vocabulary matching, none (layer input)",
    "injection",
    "cached K, V of a layer in the clear",
    "input of a layer in the clear",
)
"""The attacks that tell codecs and layers apart, weakest adversary first."""
_IDEAL = (
    "injection, were the cache in the clear",
    "moments, whitened head norms, of the very text",
)
"""Attacks that are given the whole text, to say what others could reach at best."""
_COLUMNS = ("layer", "", "attack", "recovered", "of", "chance", "random", "wrong weights")


def rows(report: dict[str, Any]) -> list[tuple[str, ...]]:
    """A line of text cells for each finding, as `_COLUMNS` says."""
    return [
        (
            str(finding["layer"]),
            finding["adversary"],
            _title(finding),
            _percent(finding["share"]),
            f"{finding['attacked']} {finding['about']}{_error(finding)}".strip(),
            _percent(finding["floor"]) if finding["attacked"] else "",
            *(
                _percent(finding["controls"].get(control, {}).get("share"))
                for control in ("random", "wrong weights")
            ),
        )
        for finding in report["findings"]
    ]


def summary(report: dict[str, Any]) -> list[tuple[str, ...]]:
    """For each adversary and layer the attack that recovered the largest share of tokens.

    An adversary can run the attacks of a weaker one. Of equal shares the one over more
    tokens is named.
    """
    layers = [WHOLE_MODEL, *report["layers"]]
    lines = [("", "all layers", *(f"layer {layer}" for layer in report["layers"]))]
    for i, adversary in enumerate(report["adversaries"]):
        cells = []
        for layer in layers:
            found = [
                finding
                for finding in report["findings"]
                if finding["attacked"]
                and finding["layer"] == layer
                and finding["adversary"] in report["adversaries"][: i + 1]
                and finding["about"].startswith("tokens")
            ]
            best = max(found, key=lambda f: (f["share"], f["attacked"]), default=None)
            cells.append(f"{_percent(best['share'])}, {_title(best)}" if best else "-")
        lines.append((adversary, *cells))
    return lines


def terminal(report: dict[str, Any]) -> str:
    """The table in aligned columns."""
    table = [_COLUMNS, *rows(report)]
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    return "\n".join(
        "  ".join(
            cell.ljust(width) for cell, width in zip(line, widths, strict=True)
        ).rstrip()
        for line in table
    )


def markdown(report: dict[str, Any]) -> str:
    """The whole report for a reader, with what was cut and how it was made."""
    versions = ", ".join(f"{name} {v}" for name, v in report["versions"].items())
    layers = ",".join(map(str, report["layers"]))
    lines = [
        f"# What leaks: {report['codec']} codec, layers {layers}",
        "",
        (
            f"{report['model']} in {report['dtype']}, {len(report['prompts'])} prompts, "
            f"{report['tokens']} tokens. {versions}; {report['threads']} threads on "
            f"{report['machine']}; seed of the controls {report['seed']}; at most "
            f"{report['budget_seconds_a_layer']:g} s of attacks per layer; "
            f"{report['written']}."
        ),
        "",
        *(f"- {name} {WHO[name]}." for name in report["adversaries"]),
        "",
        NOTES,
        "",
        "## The most that was recovered",
        "",
        *_table(summary(report)),
        "",
        "## All attacks",
        "",
        *_table([_COLUMNS, *rows(report)]),
    ]
    cuts = [
        f"- layer {finding['layer']}, {_title(finding)}: {finding['cut']}."
        for finding in report["findings"]
        if finding["cut"]
    ]
    if cuts:
        lines += [
            "",
            "Left out by the budget, or not applicable:",
            "",
            *dict.fromkeys(cuts),
        ]
    return "\n".join(lines) + "\n"


def comparison(reports: Sequence[dict[str, Any]]) -> str:
    """HEADLINES by codec and layer, in Markdown; "of 26" where 26 were attacked, as the
    rest was known or left out by the budget."""
    codecs = list(dict.fromkeys(report["codec"] for report in reports))
    found = {
        (report["codec"], _title(finding), finding["layer"]): finding
        for report in reports
        for finding in report["findings"]
    }
    layers = list(dict.fromkeys(layer for _, _, layer in found))
    columns = [(codec, layer) for layer in layers for codec in codecs]
    head = [f"{codec}, {_layer_name(layer)}" for codec, layer in columns]
    lines = [["", "attack", *head]]
    for title in HEADLINES:
        cells = [found.get((codec, title, layer)) for codec, layer in columns]
        if adversaries := [cell["adversary"] for cell in cells if cell]:
            lines.append([adversaries[0], title, *map(_cell, cells)])
    return "\n".join(_table(lines))


def overview(reports: Sequence[dict[str, Any]]) -> str:
    """The most that any attack recovered, by who ran it: of tokens, and of cached K and V
    where those were decoded. An adversary can run the attacks of a weaker one."""
    who = {
        "A1, no text known": lambda f: f["adversary"] == "A1" and not f["given_text"],
        "A1, some text known": lambda f: f["adversary"] == "A1",
        "A2": lambda f: f["adversary"] in ("A1", "A2"),
        "A3": lambda f: True,
    }
    lines = [["", *who]]
    for report in reports:
        for layer in (*report["layers"], WHOLE_MODEL):
            here = [
                f
                for f in report["findings"]
                if f["layer"] == layer and f["attack"] not in _IDEAL
            ]
            cells = [_most([f for f in here if may(f)]) for may in who.values()]
            lines.append([f"{report['codec']}, {_layer_name(layer)}", *cells])
    return "\n".join(_table(lines))


def _most(findings: Sequence[dict[str, Any]]) -> str:
    found = [f for f in findings if f["attacked"]]
    tokens = [f for f in found if f["about"].startswith("tokens")]
    vectors = [f for f in found if f["about"] == About.VECTORS.value]
    cells = [
        f"{name} {_cell(max(group, key=lambda f: (f['share'], f['attacked'])))}"
        for name, group in (("tokens", tokens), ("K, V", vectors))
        if group
    ]
    unreached = sum(bool(f["cut"]) and not f["attacked"] for f in findings)
    if unreached and max((f["share"] for f in tokens), default=0) < 1:
        cells.append(f"{unreached} attacks not reached")
    return "; ".join(cells) or "-"


def tables(reports: Sequence[dict[str, Any]]) -> dict[str, str]:
    """The tables of several reports by the names that documents call them."""
    return {
        "audit by adversary": overview(reports),
        "audit by attack": comparison(reports),
    }


def put(document: str, tables: Mapping[str, str]) -> str:
    """The document with each table between `<!-- name -->` and the next `<!-- end -->`,
    if it has the first of these comments."""
    for name, table in tables.items():
        marked = re.compile(f"(?s)(<!-- {name} -->\n).*?(<!-- end -->)")
        document = marked.sub(
            lambda found, table=table: f"{found[1]}{table}\n{found[2]}", document
        )
    return document


def _layer_name(layer: int | str) -> str:
    return "layers in the clear" if layer == WHOLE_MODEL else f"layer {layer}"


def _error(finding: dict[str, Any]) -> str:
    error = finding["error"]
    return "" if error is None else f", median error {error:.1e}"


def _cell(finding: dict[str, Any] | None) -> str:
    if finding is None:
        return ""
    attacked = finding["attacked"]
    partly = attacked and (attacked < finding["of"] or finding["cut"])
    return _percent(finding["share"]) + (f" of {attacked}" if partly else "")


def write(report: dict[str, Any], folder: Path, name: str) -> list[Path]:
    """Write name.json and name.md, and name.png where matplotlib is installed."""
    folder.mkdir(parents=True, exist_ok=True)
    files = [folder / f"{name}.json", folder / f"{name}.md"]
    files[0].write_text(json.dumps(report, indent=1, ensure_ascii=False) + "\n")
    files[1].write_text(markdown(report))
    if find_spec("matplotlib") is None:
        return files
    from scx.audit.plot import draw

    draw(report, folder / f"{name}.png")
    return [*files, folder / f"{name}.png"]


def _title(finding: dict[str, Any]) -> str:
    label = finding["label"]
    return f"{finding['attack']}: {label}" if label else finding["attack"]


def _percent(share: float | None) -> str:
    return "-" if share is None else f"{100 * share:.1f}%"


def _table(lines: Sequence[Sequence[str]]) -> list[str]:
    """Markdown, the first line its head."""
    rule = ["---"] * len(lines[0])
    return [f"| {' | '.join(cells)} |" for cells in (lines[0], rule, *lines[1:])]


def main() -> None:
    """Print the tables of the reports that are named, or write them into documents."""
    parser = argparse.ArgumentParser(prog="python -m scx.audit.report")
    parser.add_argument("reports", nargs="+", type=Path)
    parser.add_argument("--into", nargs="+", type=Path, default=[], metavar="DOCUMENT")
    options = parser.parse_args()
    made = tables([json.loads(file.read_text()) for file in options.reports])
    if not options.into:
        print("\n\n".join(made.values()))
    for document in options.into:
        document.write_text(put(document.read_text(), made))


if __name__ == "__main__":
    main()
