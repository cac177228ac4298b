"""Vocabulary matching: which token would have given what was seen?

Two ways that attacks share. What depends neither on the text before nor on the
position, as values in layer 0, is a table of the whole vocabulary. Else tokens are
found one after another, each candidate run through the model after the prefix
found so far (Hidden No More, arXiv 2505.18332, algorithm 1).
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from scipy.optimize import linear_sum_assignment

from scx.audit.interface import Budget
from scx.audit.public_model import LayerModel, States

MARGIN = 0.2
"""A search ends before the vocabulary does if the nearest candidate is at this share
of the distance of any other. The true token differs by rounding alone: in SmolLM2-135M,
layers 15 and 29, it lies at 2 to 11 percent of the nearest other in bfloat16 and below
in float32. Without such a margin, as at some first positions, all are compared."""

_BLOCK = 8192


@dataclass(frozen=True)
class Reading:
    """What is compared: a feature vector of a candidate's states with what was seen."""

    features: Callable[[States], torch.Tensor]
    """(B, F) of the states of B candidates."""
    target: torch.Tensor
    """(T, F)."""
    ordered: bool = True
    """Whether row i of the target is position i; else any row may be any position."""
    norm: float = 1.0
    """Of the distance: 1 as in Hidden No More, or 2."""


def hidden_of(states: States) -> torch.Tensor:
    """The layer's input as it is."""
    return states.hidden


def sorted_heads(*heads: torch.Tensor) -> torch.Tensor:
    """The sorted features of each head of (B, heads, D): (B, all features)."""
    return torch.cat([part.sort(-1).values.flatten(1) for part in heads], dim=1)


def distances(a: torch.Tensor, b: torch.Tensor, norm: float = 1.0) -> torch.Tensor:
    """Distances (A, B) of rows (A, F) and (B, F), without the rounding of a product."""
    return torch.cdist(a, b, p=norm, compute_mode="donot_use_mm_for_euclid_dist")


def nearest(rows: torch.Tensor, table: torch.Tensor) -> torch.Tensor:
    """The row of `table` (V, F) nearest to each of `rows` (T, F): int64 (T,).

    Euclidean, from float64 products: their rounding is far below that of the rows. The
    table is read in blocks, and of equal rows one is compared.
    """
    rows, inverse = rows.double().unique(dim=0, return_inverse=True)
    best = torch.full((len(rows),), torch.inf, dtype=torch.float64)
    found = torch.zeros(len(rows), dtype=torch.int64)
    for start in range(0, len(table), _BLOCK):
        block = table[start : start + _BLOCK].double()
        values, indices = torch.cdist(rows, block).min(1)
        nearer = values < best
        best = values.where(nearer, best)
        found = (indices + start).where(nearer, found)
    return found[inverse]


def nearest_each(
    parts: Sequence[torch.Tensor], table: torch.Tensor
) -> tuple[torch.Tensor, ...]:
    """`nearest` for several (T, F), one result per part."""
    return nearest(torch.cat(list(parts)), table).split([len(part) for part in parts])


def assign(gaps: torch.Tensor) -> torch.Tensor:
    """The column of each row of `gaps` (A, B), A <= B: int64 (A,). No column twice, and
    the gaps as small in sum as can be."""
    return torch.from_numpy(linear_sum_assignment(gaps)[1])


def features_of_table(model: LayerModel, reading: Reading) -> torch.Tensor:
    """Layer 0: the features of the whole vocabulary at the first position (V, F)."""
    return torch.cat(
        [
            reading.features(States(model, part, torch.zeros(len(part))))
            for part in model.table.split(_BLOCK)
        ]
    )


def search(
    model: LayerModel, reading: Reading, known: torch.Tensor, budget: Budget
) -> torch.Tensor:
    """Token ids that follow the `known` ones (P,), as far as the budget goes.

    Each is the nearest candidate of those compared, and is part of the prefix of
    the next. If the reading has no order, no row is taken twice.
    """
    prefix = known.tolist()
    free = torch.ones(len(reading.target), dtype=torch.bool)
    while len(prefix) < len(reading.target):
        position = len(prefix)
        rows = torch.tensor([position]) if reading.ordered else free.nonzero().flatten()
        match = _nearest_candidate(model, reading, rows, prefix, budget)
        if match is None:
            break
        token, row = match
        free[row] = False
        prefix.append(token)
    return torch.tensor(prefix[len(known) :], dtype=torch.int64)


def _nearest_candidate(
    model: LayerModel,
    reading: Reading,
    rows: torch.Tensor,
    prefix: list[int],
    budget: Budget,
) -> tuple[int, int] | None:
    """The nearest candidate and the row it is nearest to; None if time ran out."""
    best, second, match, compared = torch.inf, torch.inf, (0, 0), 0
    for ids, states in model.candidates(prefix):
        if budget.spent():
            return None
        gaps, at = distances(
            reading.features(states), reading.target[rows], reading.norm
        ).min(1)
        order = gaps.argsort()[:2]
        first = float(gaps[order[0]])
        if first < best:
            match = (int(ids[order[0]]), int(rows[at[order[0]]]))
        best, second = sorted([best, second, *gaps[order].tolist()])[:2]
        compared += len(ids)
        if best < MARGIN * second or compared >= (budget.candidates or torch.inf):
            break
    return match
