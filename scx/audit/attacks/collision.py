"""KV collision: which candidate stands out of its batch?"""

import torch

from scx.audit.attacks.vocabulary import cut_of
from scx.audit.interface import About, Attack, Budget, Claim, Knowledge, Outcome
from scx.audit.matching import distances, sorted_heads
from scx.audit.public_model import LayerModel
from scx.audit.views import View

GAP = 5.0
"""Standard deviations below the mean of a batch, of the logarithm of the distance, that
make a candidate stand out. The least of 2048 normal deviates is 3.4 below on average."""


class Collision(Attack):
    """For each position, with the text before it known: candidates by likelihood, batch
    by batch; one is taken if both its K and its V are far nearer than the others.

    The distance is Euclidean between sorted heads, which a permutation leaves alone.

    Source: KV collision (arXiv 2508.09442), with the distance changed for this codec.
    """

    name = "KV collision, sorted"
    adversary = "A1"
    given_text = True
    tried = 0.25
    """A token is given up after this share of the vocabulary."""

    def run(self, knowledge: Knowledge, view: View, budget: Budget) -> Outcome:
        claims, rows = [], 0
        by_length = sorted(enumerate(view.cache), key=lambda pair: len(pair[1].k))
        for i, (request, cache) in enumerate(by_length):
            part = budget.part(1 / (len(by_length) - i))
            rows += len(cache.k)
            k, v = sorted_heads(cache.k), sorted_heads(cache.v)
            tokens = []
            for position in range(len(k)):
                prefix = knowledge.plaintext.prefix(request, position).tolist()
                here = slice(position, position + 1)
                token = self._collide(knowledge.model, prefix, k[here], v[here], part)
                if part.spent():
                    break
                tokens.append(token)
            if tokens:
                claims.append(Claim(About.REQUEST_TOKENS, request, torch.tensor(tokens)))
        return Outcome({"": claims}, cut_of(claims, rows))

    def _collide(
        self,
        model: LayerModel,
        prefix: list[int],
        k: torch.Tensor,
        v: torch.Tensor,
        budget: Budget,
    ) -> int:
        """The token that stands out, or -1."""
        compared = 0
        limit = min(
            int(self.tried * model.vocabulary), budget.candidates or model.vocabulary
        )
        for ids, states in model.candidates(prefix):
            if budget.spent() or compared >= limit:
                break
            compared += len(ids)
            gaps = torch.cat(
                [
                    distances(sorted_heads(heads), seen, 2.0)
                    for heads, seen in ((states.k, k), (states.v, v))
                ],
                dim=1,
            )
            gaps = gaps.clamp_min(torch.finfo(gaps.dtype).tiny).log()
            far = ((gaps.mean(0) - gaps) / gaps.std(0)).amin(1)
            if far.max() > GAP:
                return int(ids[far.argmax()])
        return -1
