"""The picture of a report: recovered share by attack and layer, a panel per adversary."""

from pathlib import Path
from typing import Any

from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from scx.audit.interface import WHOLE_MODEL


def draw(report: dict[str, Any], path: Path) -> None:
    """Write the picture as PNG. Of an attack with several lines, the first is shown."""
    panels = [_panel(report, adversary) for adversary in report["adversaries"]]
    heights = [len(attacks) for attacks, _, _ in panels]
    figure = Figure(figsize=(7.5, 1.5 + 0.9 * len(panels) + 0.3 * sum(heights)))
    axes = figure.subplots(
        len(panels), 1, squeeze=False, height_ratios=[max(h, 1) for h in heights]
    )
    for axis, adversary, panel in zip(
        axes[:, 0], report["adversaries"], panels, strict=True
    ):
        _fill(axis, adversary, *panel)
    figure.suptitle(f"Recovered share, {report['codec']} codec")
    figure.tight_layout()
    figure.savefig(path, dpi=150)


def _panel(
    report: dict[str, Any], adversary: str
) -> tuple[list[str], list[str], dict[tuple[str, str], tuple[float, int]]]:
    """Attacks, layers, and of each pair that was measured the share and of how many."""
    shares: dict[tuple[str, str], tuple[float, int]] = {}
    for finding in report["findings"]:
        key = (finding["attack"], str(finding["layer"]))
        if finding["adversary"] == adversary and finding["attacked"]:
            shares.setdefault(key, (finding["share"], finding["attacked"]))
    layers = [WHOLE_MODEL, *map(str, report["layers"])]
    return list(dict.fromkeys(attack for attack, _ in shares)), layers, shares


def _fill(
    axis: Axes,
    adversary: str,
    attacks: list[str],
    layers: list[str],
    shares: dict[tuple[str, str], tuple[float, int]],
) -> None:
    colours = colormaps["Reds"]
    for y, attack in enumerate(attacks):
        for x, layer in enumerate(layers):
            if (attack, layer) not in shares:
                continue
            share, attacked = shares[attack, layer]
            axis.fill_between(
                [x - 0.5, x + 0.5], y - 0.5, y + 0.5, color=colours(0.7 * share)
            )
            text = f"{100 * share:.0f}% of {attacked}"
            axis.text(x, y, text, ha="center", va="center", fontsize=8)
    axis.set_xticks(
        range(len(layers)),
        [f"{name} layers" if name == WHOLE_MODEL else f"layer {name}" for name in layers],
    )
    axis.set_yticks(range(len(attacks)), attacks)
    axis.set_xlim(-0.5, len(layers) - 0.5)
    axis.set_ylim(max(len(attacks), 1) - 0.5, -0.5)
    axis.tick_params(length=0, labelsize=8)
    axis.set_title(adversary, loc="left", fontsize=10)
