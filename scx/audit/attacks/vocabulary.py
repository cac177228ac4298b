"""Vocabulary matching on what crosses and on the cache."""

from collections.abc import Sequence

import torch

from scx.audit.interface import (
    NO_TOKENS,
    About,
    Attack,
    Budget,
    Claim,
    Knowledge,
    Outcome,
)
from scx.audit.matching import (
    Reading,
    features_of_table,
    hidden_of,
    nearest_each,
    search,
    sorted_heads,
)
from scx.audit.public_model import LayerModel, States
from scx.audit.views import Cache, View


def sorted_kv(states: States | Cache) -> torch.Tensor:
    """K and V, each head's features sorted."""
    return sorted_heads(states.k, states.v)


def sorted_qkv(states: States) -> torch.Tensor:
    """Q, K and V, each head's features sorted."""
    return sorted_heads(states.q, states.k, states.v)


def search_each(
    model: LayerModel,
    readings: Sequence[tuple[int, Reading]],
    budget: Budget,
    given: torch.Tensor = NO_TOKENS,
) -> tuple[list[Claim], str]:
    """Tokens of requests, found one after another; the shortest request first.

    Each gets an equal part of the time that is left, so that a token which the model
    finds unlikely, hence late, does not stop all. `given` is that of `Claim`. Returns
    the claims and what the budget cut.
    """
    claims = []
    by_length = sorted(readings, key=lambda pair: len(pair[1].target))
    for i, (request, reading) in enumerate(by_length):
        tokens = search(model, reading, NO_TOKENS, budget.part(1 / (len(readings) - i)))
        if len(tokens):
            claims.append(Claim(About.REQUEST_TOKENS, request, tokens, given=given))
    return claims, cut_of(claims, sum(len(reading.target) for _, reading in readings))


def cut_of(claims: Sequence[Claim], rows: int) -> str:
    """What is missing from `rows` rows, in words."""
    done = sum(len(claim.values) for claim in claims)
    return f"{done} of {rows} tokens" if done < rows else ""


class VocabularyMatching(Attack):
    """Which token, after those found so far, gives the states that were seen?

    A subclass says what is compared, with a distance that does not see what the
    codec hides: none (as they are), S (rows in any order), D (features of a head in
    any order), SD (both). The nearest candidate is taken, not the first below a
    threshold; a search ends early when one is far nearer than all others so far (MARGIN
    in scx/audit/matching.py). In layer 0, where one table serves all rows unless keys
    are compared, the whole vocabulary is, every time.

    Source: Hidden No More (arXiv 2505.18332), algorithm 1; on K and V of one layer as
    in the vma-external repository of its authors, here per head.
    """

    def readings(self, view: View) -> list[tuple[int, Reading]]:
        """A reading a request, with the number of the request."""
        raise NotImplementedError

    def run(self, knowledge: Knowledge, view: View, budget: Budget) -> Outcome:
        return self.match(knowledge.model, self.readings(view), budget)

    def match(
        self, model: LayerModel, readings: list[tuple[int, Reading]], budget: Budget
    ) -> Outcome:
        """The claims from readings of the layer of `model`."""
        claims, cut = search_each(model, readings, budget)
        return Outcome({"": claims}, cut)


class Plain(VocabularyMatching):
    """Distance none, on the layer's input as the secure device receives it: in the
    clear, since the layer below ran on the accelerator."""

    name = "vocabulary matching, none (layer input)"
    adversary = "A2"

    def readings(self, view: View) -> list[tuple[int, Reading]]:
        return [(r, Reading(hidden_of, step.hidden)) for r, step in view.prefills()]

    def match(
        self, model: LayerModel, readings: list[tuple[int, Reading]], budget: Budget
    ) -> Outcome:
        if model.index:
            return super().match(model, readings, budget)
        return Outcome({"": _tokens(model, readings, About.REQUEST_TOKENS)})


class Shuffled(VocabularyMatching):
    """Distance S, on the rows that qkv_proj is given. In layer 0 a row says its token and
    not its position; in deeper layers its position too."""

    name = "vocabulary matching, S (qkv_proj input)"
    adversary = "A2"

    def readings(self, view: View) -> list[tuple[int, Reading]]:
        return [
            (r, Reading(hidden_of, step.rows, ordered=False))
            for r, step in view.prefills()
        ]

    def run(self, knowledge: Knowledge, view: View, budget: Budget) -> Outcome:
        if view.layer:
            return super().run(knowledge, view, budget)
        readings = [
            (index, Reading(hidden_of, step.rows))
            for index, step in enumerate(view.steps)
        ]
        return Outcome({"": _tokens(knowledge.model, readings, About.SENT_TOKENS)})


class Features(VocabularyMatching):
    """Distance D per head, on K and V of the cache."""

    name = "vocabulary matching, D (cached K, V)"
    adversary = "A1"

    def readings(self, view: View) -> list[tuple[int, Reading]]:
        return [
            (r, Reading(sorted_kv, sorted_kv(cache)))
            for r, cache in enumerate(view.cache)
        ]


class FeaturesOfQueries(VocabularyMatching):
    """Distance D per head, on Q, K and V as the attention is given them."""

    name = "vocabulary matching, D (Q, K, V)"
    adversary = "A2"

    def readings(self, view: View) -> list[tuple[int, Reading]]:
        return [
            (r, Reading(sorted_qkv, sorted_heads(step.q, step.k, step.v)))
            for r, step in view.prefills()
        ]


class ShuffledFeatures(VocabularyMatching):
    """Distance SD, on K and V of cache slots whose order is lost. In layer 0 on V, which
    says the token and not the position."""

    name = "vocabulary matching, SD (cached K, V)"
    adversary = "A1"

    def readings(self, view: View) -> list[tuple[int, Reading]]:
        return [
            (r, Reading(sorted_kv, sorted_kv(cache), ordered=False))
            for r, cache in enumerate(view.cache)
        ]

    def run(self, knowledge: Knowledge, view: View, budget: Budget) -> Outcome:
        if view.layer:
            return super().run(knowledge, view, budget)
        readings = [
            (r, Reading(lambda states: sorted_heads(states.v), sorted_heads(cache.v)))
            for r, cache in enumerate(view.cache)
        ]
        return Outcome({"": _tokens(knowledge.model, readings, About.CACHE_BAG)})


def _tokens(
    model: LayerModel, readings: Sequence[tuple[int, Reading]], about: About
) -> list[Claim]:
    """Layer 0, features that do not depend on the position: one table for all rows."""
    table = features_of_table(model, readings[0][1])
    found = nearest_each([reading.target for _, reading in readings], table)
    return [
        Claim(about, index, tokens)
        for (index, _), tokens in zip(readings, found, strict=True)
    ]
