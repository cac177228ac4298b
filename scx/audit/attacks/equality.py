"""Which tokens of a text are equal to which."""

import torch

from scx.audit.interface import About, Attack, Budget, Claim, Knowledge, Outcome
from scx.audit.matching import distances
from scx.audit.views import View

EQUAL = 1e-3
"""Distance of two rows of V over their norm below which they count as equal."""


class Equality(Attack):
    """Rows of cached V that are equal: any map that is fixed for a head keeps them so.

    In layer 0 they are equal tokens. Deeper, V depends on the text before. Needs no
    weights. Source: measured in this project.
    """

    name = "token equality"
    adversary = "A1"
    uses_weights = False

    def run(self, knowledge: Knowledge, view: View, budget: Budget) -> Outcome:
        claims = []
        for request, cache in enumerate(view.cache):
            rows = cache.v.flatten(1)
            equal = distances(rows, rows, 2.0) < EQUAL * rows.norm(dim=1)
            first = equal.to(torch.int8).argmax(1)
            claims.append(Claim(About.EQUALITY, request, first))
        return Outcome({"": claims})
