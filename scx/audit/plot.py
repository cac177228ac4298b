"""The picture of a report: recovered share by attack and layer, a panel an adversary."""

from pathlib import Path
from typing import Any

from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.figure import Figure


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
) -> tuple[list[str], list[str], dict[tuple[str, str], float]]:
    """Attacks, layers, and the share of each pair that was measured."""
    shares: dict[tuple[str, str], float] = {}
    for finding in report["findings"]:
        key = (finding["attack"], str(finding["layer"]))
        if finding["adversary"] == adversary and finding["share"] is not None:
            shares.setdefault(key, finding["share"])
    layers = ["all", *map(str, report["layers"])]
    return list(dict.fromkeys(attack for attack, _ in shares)), layers, shares


def _fill(
    axis: Axes,
    adversary: str,
    attacks: list[str],
    layers: list[str],
    shares: dict[tuple[str, str], float],
) -> None:
    colours = colormaps["Reds"]
    for y, attack in enumerate(attacks):
        for x, layer in enumerate(layers):
            if (share := shares.get((attack, layer))) is None:
                continue
            axis.fill_between(
                [x - 0.5, x + 0.5], y - 0.5, y + 0.5, color=colours(0.7 * share)
            )
            axis.text(x, y, f"{100 * share:.0f}%", ha="center", va="center", fontsize=8)
    axis.set_xticks(
        range(len(layers)),
        [name if name == "all" else f"layer {name}" for name in layers],
    )
    axis.set_yticks(range(len(attacks)), attacks)
    axis.set_xlim(-0.5, len(layers) - 0.5)
    axis.set_ylim(max(len(attacks), 1) - 0.5, -0.5)
    axis.tick_params(length=0, labelsize=8)
    axis.set_title(adversary, loc="left", fontsize=10)
