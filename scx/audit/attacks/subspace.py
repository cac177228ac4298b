"""Subspace membership: mixing rows hides their order, not which rows they are."""

import torch

from scx.audit.interface import About, Attack, Budget, Claim, Knowledge, Outcome
from scx.audit.public_model import LayerModel
from scx.audit.views import View

RESIDUAL = 0.03
"""Share of a row's norm outside of the row space below which it counts as a member. In
SmolLM2-135M members stay below 0.003 in bfloat16, and others, that were hardly trained
and are nearly parallel, come down to 0.045."""


def members(rows: torch.Tensor, table: torch.Tensor) -> torch.Tensor:
    """The rows of `table` (V, H) that lie in the row space of `rows` (T, H)."""
    _, values, basis = torch.linalg.svd(rows, full_matrices=False)
    basis = basis[values > 1e-5 * values[0]]
    inside = (table @ basis.T).square().sum(1)
    residual = (1 - inside / table.square().sum(1)).clamp_min(0).sqrt()
    return (residual < RESIDUAL).nonzero().flatten()


class Subspace(Attack):
    """Which rows of the vocabulary lie in the row space of what qkv_proj is given?

    An invertible mix of the rows, decoys among them or not, leaves the row space as it
    is, so this breaks more than a permutation of rows. In layer 0, for steps of fewer
    rows than half of the features.

    Source: measured in this project; against row mixing as in GELO (arXiv 2603.05035).
    """

    name = "subspace membership"
    adversary = "A2"
    scope = "layer 0"

    def run(self, knowledge: Knowledge, view: View, budget: Budget) -> Outcome:
        model: LayerModel = knowledge.model
        table, claims, cut = model.table, [], ""
        fitting = [
            (index, step.rows)
            for index, step in enumerate(view.steps)
            if 2 * len(step.rows) < step.rows.shape[1]
        ]
        for index, rows in sorted(fitting, key=lambda pair: len(pair[1]), reverse=True):
            if budget.spent():
                cut = f"{len(claims)} of {len(fitting)} steps"
                break
            claims.append(Claim(About.STEP_BAG, index, members(rows, table)))
        return Outcome({"": claims}, cut)
