"""The affine map of each head: solved from vectors that are known with their encoding,
and what it then reads. A permutation and the affine codec are both such a map.
"""

from collections.abc import Mapping, Sequence

import torch

from scx.audit.attacks.vocabulary import search_each
from scx.audit.interface import NO_TOKENS, About, Budget, Claim, Knowledge, Outcome
from scx.audit.matching import Reading, nearest_each
from scx.audit.public_model import LayerModel, States
from scx.audit.views import BorderStep, Cache


def heads_of(seen: Cache | BorderStep | States) -> torch.Tensor:
    """Keys after RoPE, then values (T, 2M, D): what a cache holds."""
    return torch.cat([seen.k, seen.v], dim=1)


def solve(known: torch.Tensor, image: torch.Tensor) -> torch.Tensor:
    """The affine map (heads, D + 1, D) that takes `known` to `image`, both (T, heads, D).

    For each head least squares of minimum norm about the mean of the known rows, the
    last row of the map its constant: with a constant inside the norm, a codec with a
    large offset would be harder to solve, and no safer. Float64, since few known
    rows make it singular. From encoded to clear it decodes, the other way it encodes.
    """
    known, image = known.double(), image.double()
    middle, target = (part.sum(0) / max(len(part), 1) for part in (known, image))
    inverse = torch.linalg.pinv((known - middle).transpose(0, 1), rtol=1e-6)
    maps = inverse @ (image - target).transpose(0, 1)
    constant = target - torch.einsum("md,mde->me", middle, maps)
    return torch.cat([maps, constant[:, None]], dim=1)


def apply(maps: torch.Tensor, heads: torch.Tensor) -> torch.Tensor:
    """Heads (T, heads, D) as `solve`'s map takes them, float32."""
    mapped = torch.einsum("tmd,mde->tme", heads.double(), maps[:, :-1])
    return (mapped + maps[:, -1]).float()


def decoded(
    model: LayerModel, maps: torch.Tensor, cache: Cache, request: int, first: int = 0
) -> Claim:
    """The claim that a request's cache from row `first` on is what a map (2M, D + 1, D)
    from encoded to clear makes of it, with RoPE undone at the known positions."""
    k, v = apply(maps, heads_of(cache)[first:]).chunk(2, dim=1)
    k = model.unrotate(k, torch.arange(first, len(cache.k)))
    return Claim(About.VECTORS, request, torch.cat([k, v], dim=1), first)


def mapped_reading(maps: torch.Tensor, v: torch.Tensor) -> Reading:
    """A reading of encoded V (T, M, D) by the map that encodes it.

    Candidates are encoded, not V decoded: a map of few known rows has no inverse.
    """

    def features(states: States) -> torch.Tensor:
        return apply(maps, states.v).flatten(1)

    return Reading(features, v.flatten(1), norm=2.0)


def first_layer_tokens(
    model: LayerModel, maps: torch.Tensor, values: Sequence[torch.Tensor]
) -> tuple[torch.Tensor, ...]:
    """Layer 0: of the whole vocabulary, the tokens (T,) whose mapped V is nearest to
    that of each part (T, M, D)."""
    table = apply(maps, model.value_table).flatten(1)
    return nearest_each([v.flatten(1) for v in values], table)


def read_requests(
    knowledge: Knowledge,
    maps: torch.Tensor,
    values: Mapping[int, torch.Tensor],
    budget: Budget,
    given: torch.Tensor = NO_TOKENS,
) -> Outcome:
    """Tokens of requests from their encoded V (T, M, D), by the map that encodes it.
    `given` is that of `Claim`."""
    model = knowledge.model
    if model.index:
        readings = [(r, mapped_reading(maps, v)) for r, v in values.items()]
        claims, cut = search_each(model, readings, budget, given)
        return Outcome({"": claims}, cut)
    found = first_layer_tokens(model, maps, list(values.values()))
    claims = [
        Claim(About.REQUEST_TOKENS, request, tokens, given=given)
        for request, tokens in zip(values, found, strict=True)
    ]
    return Outcome({"": claims})
