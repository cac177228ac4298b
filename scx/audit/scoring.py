"""One scorer for all attacks: the claims against what was recorded.

Equal contents are interchangeable: a claim that takes one of two equal rows for
the other is right.
"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import torch

from scx.audit.capture import Capture
from scx.audit.interface import About, Claim
from scx.audit.views import BorderStep, border_steps

DECODED = 0.1
"""Error below which a cached vector counts as decoded: its distance from the true one
over the root mean square distance of that head's true vectors from their mean, so that
an attacker who knows only the mean has an error of about one. A tenth is one percent of
that variance. Attention weights and a search for the token tolerate that much: 16-bit
rounding alone moves a vector by up to a tenth of the way to another token's."""

NO_ERRORS = torch.empty(0)


@dataclass(frozen=True)
class Score:
    """How much of what was attacked is right."""

    share: float
    """0 to 1."""
    floor: float
    """What blind guessing reaches: 0 to 1."""
    attacked: int
    """Tokens, rows, features or pairs that claims were made about."""
    of: int
    """How many of them the attacked requests or steps have in all."""
    error: float | None = None
    """The median error of decoded vectors, as `DECODED` measures it."""


class Truth:
    """What was recorded of one layer, for the scorer alone."""

    def __init__(self, capture: Capture, layer: int, vocabulary: int) -> None:
        self.vocabulary = vocabulary
        self.requests = [capture.ids(r) for r in range(len(capture.alone))]
        self.steps = border_steps(capture, layer)
        recorded = [step for steps in capture.alone for step in steps]
        self.step_ids = [step.input_ids for step in (*recorded, *capture.together)]
        self._alone = len(recorded)
        self._columns: torch.Tensor | None = None

    @cached_property
    def vectors(self) -> list[torch.Tensor]:
        """Each request's keys before RoPE, then its values, in clear: (T, 2M, D)."""
        clear = [
            torch.cat([step.keys_sent(), step.values_sent()], dim=1)[self._order(step)]
            for step in self.steps[: self._alone]
        ]
        rows = torch.cat(clear)
        return list(rows.split([len(ids) for ids in self.requests]))

    def _order(self, step: BorderStep) -> torch.Tensor:
        """The row sent (T,) that each row of the batch is; equal ones interchangeably."""
        sent = {row.numpy().tobytes(): i for i, row in enumerate(step.rows)}
        return torch.tensor([sent[row.numpy().tobytes()] for row in step.hidden])

    def sent(self, step: int) -> torch.Tensor:
        """The row of the batch (T,) that each row sent is; equal ones interchangeably."""
        border = self.steps[step]
        first = {row.numpy().tobytes(): i for i, row in enumerate(border.hidden)}
        return torch.tensor([first[row.numpy().tobytes()] for row in border.rows])

    def columns(self) -> torch.Tensor:
        """The clear feature (M, D) that each encoded feature of V is, -1 for none."""
        if self._columns is None:
            longest = max(range(len(self.steps)), key=lambda i: len(self.steps[i].rows))
            step = self.steps[longest]
            clear = step.values_sent()[self._order(step)].permute(1, 2, 0)
            coded = step.v.permute(1, 2, 0)
            distance = torch.cdist(
                coded, clear, compute_mode="donot_use_mm_for_euclid_dist"
            )
            nearest = distance.min(-1)
            # Far above the rounding of one product, far below another feature.
            same = nearest.values < 1e-4 * coded.norm(dim=-1)
            self._columns = nearest.indices.where(same, torch.tensor(-1))
        return self._columns


def score(claims: Sequence[Claim], truth: Truth) -> Score:
    """The score of the claims of one label, which are all about the same kind."""
    parts = [_SCORERS[claim.about](claim, truth) for claim in claims]
    attacked = sum(part.attacked for part in parts)
    right = sum(part.right for part in parts)
    floor = sum(part.floor * part.attacked for part in parts)
    errors = torch.cat([part.errors for part in parts]) if parts else NO_ERRORS
    share = max(attacked, 1)
    return Score(
        right / share,
        floor / share,
        attacked,
        sum(part.of for part in parts),
        float(errors.median()) if len(errors) else None,
    )


class _Part(NamedTuple):
    right: int
    attacked: int
    floor: float
    """The chance of one."""
    of: int
    """How many there are."""
    errors: torch.Tensor = NO_ERRORS


def _tokens(claim: Claim, expected: torch.Tensor, truth: Truth) -> _Part:
    attacked = expected[claim.first : claim.first + len(claim.values)]
    right = int((claim.values == attacked).sum())
    again = float(torch.isin(attacked, claim.given).float().mean())
    floor = max(_most_common(truth.requests), again)
    return _Part(right, len(attacked), floor, len(expected))


def _most_common(requests: Sequence[torch.Tensor]) -> float:
    """The share of tokens that naming the most common one gets right."""
    ids = torch.cat(list(requests))
    return int(ids.unique(return_counts=True)[1].max()) / len(ids)


def _request_tokens(claim: Claim, truth: Truth) -> _Part:
    return _tokens(claim, truth.requests[claim.index], truth)


def _step_tokens(claim: Claim, truth: Truth) -> _Part:
    return _tokens(claim, truth.step_ids[claim.index], truth)


def _sent_tokens(claim: Claim, truth: Truth) -> _Part:
    ids = truth.step_ids[claim.index]
    return _tokens(claim, ids[truth.sent(claim.index)], truth)


def _cache_bag(claim: Claim, truth: Truth) -> _Part:
    ids = truth.requests[claim.index]
    common = Counter(claim.values.tolist()) & Counter(ids.tolist())
    floor = _most_common(truth.requests)
    return _Part(common.total(), len(claim.values), floor, len(ids))


def _step_bag(claim: Claim, truth: Truth) -> _Part:
    claimed = set(claim.values.tolist())
    true = set(truth.step_ids[claim.index].tolist())
    union = len(claimed | true)
    return _Part(len(claimed & true), union, len(true) / truth.vocabulary, union)


def _text(claim: Claim, truth: Truth) -> _Part:
    """The floor is what the claim has in common with the other requests."""
    ids = truth.requests[claim.index]
    others = [t for r, t in enumerate(truth.requests) if r != claim.index]
    shares = [_in_common(claim.values, other) / len(other) for other in others]
    floor = sum(shares) / max(len(shares), 1)
    return _Part(_in_common(claim.values, ids), len(ids), floor, len(ids))


def _in_common(values: torch.Tensor, ids: torch.Tensor) -> int:
    """The length of the longest common subsequence."""
    lengths = [0] * (len(ids) + 1)
    for value in values.tolist():
        diagonal = 0
        for i, token in enumerate(ids.tolist()):
            above = lengths[i + 1]
            lengths[i + 1] = diagonal + 1 if token == value else max(above, lengths[i])
            diagonal = above
    return lengths[-1]


def _row_order(claim: Claim, truth: Truth) -> _Part:
    step = truth.steps[claim.index]
    right = (step.rows[claim.values] == step.hidden).all(-1)
    same = _equal_rows(step)
    return _Part(int(right.sum()), len(right), float(same.float().mean()), len(right))


def _equal_rows(step: BorderStep) -> torch.Tensor:
    _, classes = step.hidden.unique(dim=0, return_inverse=True)
    return classes[:, None] == classes


def _columns(claim: Claim, truth: Truth) -> _Part:
    expected = truth.columns()
    right = int((claim.values == expected).sum())
    return _Part(right, expected.numel(), 1 / expected.shape[-1], expected.numel())


def _vectors(claim: Claim, truth: Truth) -> _Part:
    """The floor is the share of vectors that their mean is as near to."""
    everything = torch.cat(truth.vectors)
    mean = everything.mean(0)
    spread = (everything - mean).square().sum(-1).mean(0).sqrt()
    true = truth.vectors[claim.index]
    attacked = true[claim.first :]
    errors = (claim.values - attacked).norm(dim=-1) / spread
    blind = (mean - attacked).norm(dim=-1) / spread
    return _Part(
        int((errors < DECODED).sum()),
        errors.numel(),
        float((blind < DECODED).float().mean()),
        true[..., 0].numel(),
        errors.flatten(),
    )


def _equality(claim: Claim, truth: Truth) -> _Part:
    ids = truth.requests[claim.index]
    pairs = torch.ones(len(ids), len(ids), dtype=torch.bool).triu(1)
    true = (ids[:, None] == ids) & pairs
    claimed = (claim.values[:, None] == claim.values) & pairs
    union = int((true | claimed).sum())
    floor = int(true.sum()) / max(int(pairs.sum()), 1)
    return _Part(int((true & claimed).sum()), union, floor, union)


_SCORERS = {
    About.REQUEST_TOKENS: _request_tokens,
    About.STEP_TOKENS: _step_tokens,
    About.SENT_TOKENS: _sent_tokens,
    About.CACHE_BAG: _cache_bag,
    About.STEP_BAG: _step_bag,
    About.TEXT: _text,
    About.ROW_ORDER: _row_order,
    About.COLUMNS: _columns,
    About.EQUALITY: _equality,
    About.VECTORS: _vectors,
}
