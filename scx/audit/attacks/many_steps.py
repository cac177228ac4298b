"""Many steps under one key: the features show themselves by their distributions."""

import torch

from scx.audit.attacks.moments import public_values
from scx.audit.interface import About, Attack, Budget, Claim, Knowledge, Outcome
from scx.audit.matching import assign, distances
from scx.audit.views import View

QUANTILES = 65


def profiles(heads: torch.Tensor) -> torch.Tensor:
    """The quantiles of each feature of each head of (T, M, D): (M, D, 65)."""
    points = torch.linspace(0, 1, QUANTILES)
    return torch.quantile(heads.permute(1, 2, 0), points, dim=-1).permute(1, 2, 0)


class ManySteps(Attack):
    """All rows of V that were cached under one key, against V of public text: a feature
    is paired with the clear one of the most similar distribution, so that the pairs
    together are as similar as possible.

    Source: AloePri's and GELO's column-moment attacks (arXiv 2603.01499, 2603.05035),
    with quantiles for moments.
    """

    name = "many steps under one key"
    adversary = "A1"
    rows = (16, 64, 256)

    def run(self, knowledge: Knowledge, view: View, budget: Budget) -> Outcome:
        cached = torch.cat([cache.v for cache in view.cache])
        public = profiles(public_values(knowledge.model, knowledge.public_text))
        claims = {}
        for rows in (len(cached), *(n for n in self.rows if n < len(cached))):
            gaps = distances(profiles(cached[:rows]), public)
            columns = torch.stack([assign(head) for head in gaps])
            claims[f"{rows} rows"] = [Claim(About.COLUMNS, 0, columns)]
        return Outcome(claims)
