"""Dictionaries of V in layer 0: one entry per token, whatever came before."""

import torch

from scx.audit.interface import Attack, Budget, Knowledge, Outcome, request_tokens
from scx.audit.matching import nearest_each, sorted_heads
from scx.audit.views import View


class Dictionary(Attack):
    """Nearest neighbour between cached V and a table of all tokens, in layer 0.

    A subclass says what of V is compared: something that the codec leaves as it is.
    """

    adversary = "A1"
    scope = "layer 0"

    def invariant(self, heads: torch.Tensor) -> torch.Tensor:
        """(T, F) of V (T, M, D)."""
        raise NotImplementedError

    def run(self, knowledge: Knowledge, view: View, budget: Budget) -> Outcome:
        table = self.invariant(knowledge.model.value_table)
        found = nearest_each([self.invariant(cache.v) for cache in view.cache], table)
        return Outcome({"": request_tokens(found)})


class SortedValues(Dictionary):
    """A permutation of a head's features leaves its sorted values.

    Source: measured in this project; the sorted distance is Hidden No More's D
    (arXiv 2505.18332).
    """

    name = "dictionary of sorted values"

    def invariant(self, heads: torch.Tensor) -> torch.Tensor:
        return sorted_heads(heads)


class HeadNorms(Dictionary):
    """Any permutation or rotation of a head's features leaves its norm: M numbers.

    Source: the attack log of the gelo-lightrag project on GELO (arXiv 2603.05035).
    """

    name = "dictionary of head norms"

    def invariant(self, heads: torch.Tensor) -> torch.Tensor:
        return heads.norm(dim=-1)
