"""One scorer for all attacks: the claims against what was recorded.

Equal contents are interchangeable: a claim that takes one of two equal rows for
the other is right.
"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from scx.audit.capture import Capture
from scx.audit.interface import About, Claim
from scx.audit.views import BorderStep, border_steps


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
    """As many there are in the requests or steps that the attack took on."""


class Truth:
    """What was recorded of one layer, for the scorer alone."""

    def __init__(self, capture: Capture, layer: int, vocabulary: int) -> None:
        self.vocabulary = vocabulary
        self.requests = [capture.ids(r) for r in range(len(capture.alone))]
        self.steps = border_steps(capture, layer)
        recorded = [step for steps in capture.alone for step in steps]
        self.step_ids = [step.input_ids for step in (*recorded, *capture.together)]
        self._columns: torch.Tensor | None = None

    def sent(self, step: int) -> torch.Tensor:
        """The row of the batch (T,) that each row sent is; of equal rows any."""
        border = self.steps[step]
        first = {row.numpy().tobytes(): i for i, row in enumerate(border.hidden)}
        return torch.tensor([first[row.numpy().tobytes()] for row in border.rows])

    def columns(self) -> torch.Tensor:
        """The clear feature (M, D) that each encoded feature of V is, -1 for none."""
        if self._columns is None:
            longest = max(range(len(self.steps)), key=lambda i: len(self.steps[i].rows))
            step = self.steps[longest]
            clear = torch.empty_like(step.v)
            clear[self.sent(longest)] = step.values_sent()
            known = self.sent(longest).unique()
            clear, coded = clear[known].permute(1, 2, 0), step.v[known].permute(1, 2, 0)
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
    attacked = sum(part[1] for part in parts)
    right = sum(part[0] for part in parts)
    floor = sum(part[2] * part[1] for part in parts)
    share = max(attacked, 1)
    return Score(right / share, floor / share, attacked, sum(part[3] for part in parts))


# Right, attacked, chance floor of one, and how many there are.
_Part = tuple[int, int, float, int]


def _tokens(claim: Claim, expected: torch.Tensor, truth: Truth) -> _Part:
    attacked = expected[claim.first : claim.first + len(claim.values)]
    right = int((claim.values == attacked).sum())
    again = float(torch.isin(attacked, claim.given).float().mean())
    floor = max(_most_common(truth.requests), again)
    return right, len(attacked), floor, len(expected)


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
    return common.total(), len(claim.values), _most_common(truth.requests), len(ids)


def _step_bag(claim: Claim, truth: Truth) -> _Part:
    claimed = set(claim.values.tolist())
    true = set(truth.step_ids[claim.index].tolist())
    union = len(claimed | true)
    return len(claimed & true), union, len(true) / truth.vocabulary, union


def _text(claim: Claim, truth: Truth) -> _Part:
    """The floor is what the claim has in common with the other requests."""
    ids = truth.requests[claim.index]
    others = [t for r, t in enumerate(truth.requests) if r != claim.index]
    shares = [_in_common(claim.values, other) / len(other) for other in others]
    floor = sum(shares) / max(len(shares), 1)
    return _in_common(claim.values, ids), len(ids), floor, len(ids)


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
    return int(right.sum()), len(right), float(same.float().mean()), len(right)


def _equal_rows(step: BorderStep) -> torch.Tensor:
    _, classes = step.hidden.unique(dim=0, return_inverse=True)
    return classes[:, None] == classes


def _columns(claim: Claim, truth: Truth) -> _Part:
    expected = truth.columns()
    right = int((claim.values == expected).sum())
    return right, expected.numel(), 1 / expected.shape[-1], expected.numel()


def _equality(claim: Claim, truth: Truth) -> _Part:
    ids = truth.requests[claim.index]
    pairs = torch.ones(len(ids), len(ids), dtype=torch.bool).triu(1)
    true = (ids[:, None] == ids) & pairs
    claimed = (claim.values[:, None] == claim.values) & pairs
    union = int((true | claimed).sum())
    floor = int(true.sum()) / max(int(pairs.sum()), 1)
    return int((true & claimed).sum()), union, floor, union


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
}
