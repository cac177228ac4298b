"""Linking the two views of V: the same values cross twice."""

import torch

from scx.audit.interface import About, Attack, Budget, Claim, Knowledge, Outcome
from scx.audit.matching import assign, distances, sorted_heads
from scx.audit.views import BorderStep, View


def link(step: BorderStep) -> tuple[torch.Tensor, torch.Tensor]:
    """The sent row (T,) that each row of the batch is, and the clear feature (M, D)
    that each encoded feature of V is.

    A permutation of a head's features leaves its sorted values as they are. They
    match the rows; with the rows in order, equal columns match the features. Each row
    and each feature has one partner.
    """
    sent, coded = step.values_sent(), step.v
    order = assign(distances(sorted_heads(coded), sorted_heads(sent)))
    gaps = distances(coded.permute(1, 2, 0), sent[order].permute(1, 2, 0))
    return order, torch.stack([assign(head) for head in gaps])


class Linking(Attack):
    """The accelerator returns V with its rows shuffled, and is given it again with its
    rows in order and its features encoded. Needs no weights and no text.

    Source: measured in this project first; the step that aligns two shuffled copies
    of an activation is that of the attack on shuffling defences, ACL 2026, long 1341.
    """

    name = "linking the two views of V"
    adversary = "A2"
    uses_weights = False

    def run(self, knowledge: Knowledge, view: View, budget: Budget) -> Outcome:
        claims: dict[str, list[Claim]] = {
            label: [] for label in ("rows, alone", "rows, in a batch", "features")
        }
        longest = 0
        for index, step in enumerate(view.steps):
            if len(step.rows) == 1:
                continue
            order, columns = link(step)
            label = "rows, in a batch" if step.request is None else "rows, alone"
            claims[label].append(Claim(About.ROW_ORDER, index, order))
            if len(order) > longest:
                longest = len(order)
                claims["features"] = [Claim(About.COLUMNS, index, columns)]
        return Outcome(claims)
