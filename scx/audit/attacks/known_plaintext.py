"""Known plaintext: solve the key from text that is known, read the rest."""

import torch

from scx.audit.attacks.vocabulary import cut_of, search_each
from scx.audit.interface import About, Attack, Budget, Claim, Knowledge, Outcome
from scx.audit.matching import Reading, nearest, search
from scx.audit.public_model import LayerModel, States
from scx.audit.views import View


def solve(clear: torch.Tensor, coded: torch.Tensor) -> torch.Tensor:
    """The affine map (M, D + 1, D) that takes V in the clear to V encoded (T, M, D).

    For each head least squares of minimum norm about the mean of the known rows, the
    last row of the map its constant: with a constant inside the norm, a codec with a
    large offset would be harder to solve, and no safer. Float64, since few known
    tokens make it singular.
    """
    known, seen = clear.double(), coded.double()
    middle, image = (part.sum(0) / max(len(part), 1) for part in (known, seen))
    inverse = torch.linalg.pinv((known - middle).transpose(0, 1), rtol=1e-6)
    maps = inverse @ (seen - image).transpose(0, 1)
    constant = image - torch.einsum("md,mde->me", middle, maps)
    return torch.cat([maps, constant[:, None]], dim=1).float()


def encode(maps: torch.Tensor, clear: torch.Tensor) -> torch.Tensor:
    """V as `solve`'s map encodes it: (T, M, D) from (T, M, D)."""
    return torch.einsum("tmd,mde->tme", clear, maps[:, :-1]) + maps[:, -1]


def mapped_reading(maps: torch.Tensor, v: torch.Tensor) -> Reading:
    """A reading of encoded V (T, M, D) once its map is solved."""

    def features(states: States) -> torch.Tensor:
        return encode(maps, states.v).flatten(1)

    return Reading(features, v.flatten(1), norm=2.0)


def first_layer_tokens(
    model: LayerModel, maps: torch.Tensor, v: torch.Tensor
) -> torch.Tensor:
    """Layer 0: the token whose mapped V is nearest, of the whole vocabulary (T,)."""
    table = encode(maps, model.value_table).flatten(1)
    return nearest(v.flatten(1), table)


class KnownPrefix(Attack):
    """Given the first tokens of a request, as a chat template or system prompt is
    public, solves the affine map of each head and reads the rest of that request.

    In layer 0 the nearest of the whole mapped vocabulary is taken, for the requests
    that are longer than the longest prefix by as much again. Deeper, for the longest
    request, candidates after the tokens found so far; with fewer known tokens than
    features none stands out, so only the likeliest are compared.

    Source: measured in this project. Least squares on known rows is the anchor attack
    of GELO (arXiv 2603.05035, section 4.3).
    """

    name = "known prefix, least squares"
    adversary = "A1"
    lengths = (8, 0, 1, 2, 3, 4, 6, 16, 32, 64)
    deep_lengths = (64, 32, 16)
    deep_candidates = 1024

    def run(self, knowledge: Knowledge, view: View, budget: Budget) -> Outcome:
        at_first, model = view.layer == 0, knowledge.model
        lengths = self.lengths if at_first else self.deep_lengths
        sizes = {r: len(cache.v) for r, cache in enumerate(view.cache)}
        long = [r for r, size in sizes.items() if size >= 2 * max(lengths)]
        if not long:
            return Outcome({}, f"no request of {2 * max(lengths)} tokens")
        requests = long if at_first else [max(long, key=lambda r: sizes[r])]
        claims = {}
        cuts = []
        for i, length in enumerate(lengths):
            if budget.spent():
                cuts.append(f"{length} tokens and what follows")
                break
            part = budget.part(1 / (len(lengths) - i))
            part.candidates = budget.candidates or self.deep_candidates
            label, claims_here, rows = f"{length} tokens", [], 0
            for request in requests:
                v = view.cache[request].v
                rows += len(v) - length
                known = knowledge.plaintext.prefix(request, length)
                clear = model.trace(known).v if length else v[:0]
                maps = solve(clear, v[:length])
                if at_first:
                    tokens = first_layer_tokens(model, maps, v[length:])
                else:
                    tokens = search(model, mapped_reading(maps, v), known, part)
                claims_here.append(
                    Claim(About.REQUEST_TOKENS, request, tokens, length, given=known)
                )
            claims[label] = claims_here
            if cut := cut_of(claims_here, rows):
                cuts.append(f"{label}: {cut}")
        return Outcome(claims, "; ".join(cuts))


class Neighbour(Attack):
    """Another tenant, who knows its own request, the longest of a common batch, solves
    the map from it and reads the others.

    The key is the engine's and not the request's, so any request of the tenant's would
    do, in any batch. Source: chosen plaintext as in KV collision+ (arXiv 2508.09442).
    """

    name = "another tenant's known plaintext"
    adversary = "A1"

    def run(self, knowledge: Knowledge, view: View, budget: Budget) -> Outcome:
        if len(view.batch) < 2:
            return Outcome({}, "no two requests were prefilled in one step")
        model = knowledge.model
        sizes = [len(cache.v) for cache in view.batch]
        own = sizes.index(max(sizes))
        text = knowledge.plaintext.prefix(own, sizes[own])
        maps = solve(model.trace(text).v, view.batch[own].v)
        others = [r for r in range(len(sizes)) if r != own]
        values = {r: view.batch[r].v for r in others}
        if view.layer:
            readings = [(r, mapped_reading(maps, v)) for r, v in values.items()]
            claims, cut = search_each(model, readings, budget, given=text)
            return Outcome({"": claims}, cut)
        found = {r: first_layer_tokens(model, maps, v) for r, v in values.items()}
        return Outcome(
            {
                "": [
                    Claim(About.REQUEST_TOKENS, r, tokens, given=text)
                    for r, tokens in found.items()
                ]
            }
        )
