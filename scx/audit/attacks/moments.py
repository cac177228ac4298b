"""Moments of other text: undo an affine map up to a rotation, compare what is left."""

import torch

from scx.audit.interface import Attack, Budget, Knowledge, Outcome, request_tokens
from scx.audit.matching import nearest
from scx.audit.public_model import LayerModel
from scx.audit.views import View

CHUNK = 512


def public_values(model: LayerModel, ids: torch.Tensor) -> torch.Tensor:
    """V in the clear of a text (T, M, D), read in pieces of 512 tokens."""
    return torch.cat([model.trace(part).v for part in ids.split(CHUNK)])


def whitened_norms(heads: torch.Tensor, sample: torch.Tensor) -> torch.Tensor:
    """The norm of each head of `heads` (T, M, D) in the metric of a sample (S, M, D).

    An invertible affine map of both changes nothing: (T, M).
    """
    heads, sample = heads.double(), sample.double()
    mean = sample.mean(0)
    centred = (sample - mean).permute(1, 2, 0)
    covariance = centred @ centred.mT / sample.shape[0]
    inverse = torch.linalg.pinv(covariance, rtol=1e-6, hermitian=True)
    offset = heads - mean
    squares = torch.einsum("tmd,mde,tme->tm", offset, inverse, offset)
    return squares.clamp_min(0).sqrt().float()


class Moments(Attack):
    """Whitens cached V with its own mean and covariance, and the dictionary of layer 0
    with those of public text; then compares M norms per token.

    Source: measured in this project.
    """

    name = "moments, whitened head norms"
    adversary = "A1"
    scope = "layer 0"

    def run(self, knowledge: Knowledge, view: View, budget: Budget) -> Outcome:
        cached = torch.cat([cache.v for cache in view.cache])
        seen = whitened_norms(cached, cached)
        sample = self.sample(knowledge, view)
        table = whitened_norms(knowledge.model.value_table, sample)
        lengths = [len(cache.v) for cache in view.cache]
        return Outcome({"": request_tokens(nearest(seen, table).split(lengths))})

    def sample(self, knowledge: Knowledge, view: View) -> torch.Tensor:
        """V in the clear (S, M, D) whose moments are taken."""
        return public_values(knowledge.model, knowledge.public_text)


class PerfectMoments(Moments):
    """The same with the moments of the very text, which it is given: what the attack
    would do at best."""

    name = "moments, whitened head norms, of the very text"
    given_text = True

    def sample(self, knowledge: Knowledge, view: View) -> torch.Tensor:
        texts = [
            knowledge.plaintext.prefix(r, len(cache.v))
            for r, cache in enumerate(view.cache)
        ]
        return knowledge.model.value_table[torch.cat(texts)]
