"""Known plaintext: solve the key from text that is known, read the rest."""

from scx.audit.attacks.affine_map import (
    decoded,
    first_layer_tokens,
    heads_of,
    mapped_reading,
    read_requests,
    solve,
)
from scx.audit.attacks.vocabulary import cut_of
from scx.audit.interface import About, Attack, Budget, Claim, Knowledge, Outcome
from scx.audit.matching import search
from scx.audit.views import View


def longest_request(view: View) -> int:
    """The request with the longest cache."""
    return max(range(len(view.cache)), key=lambda r: len(view.cache[r].v))


class KnownPrefix(Attack):
    """Given the first tokens of a request, as a chat template or system prompt is
    public, solves the affine map of V of each head and reads the rest of that request.

    In layer 0 a few tokens do. The nearest of the whole mapped vocabulary is taken, for
    the requests that are longer than the longest prefix by as much again. Deeper, with
    twice as many tokens as a head has features, candidates after the tokens found so
    far, for the longest request.

    Source: measured in this project. Least squares on known rows is the anchor attack
    of GELO (arXiv 2603.05035, section 4.3).
    """

    name = "known prefix, least squares"
    adversary = "A1"
    given_text = True
    lengths = (8, 0, 2, 4, 16, 64)

    def run(self, knowledge: Knowledge, view: View, budget: Budget) -> Outcome:
        if view.layer:
            return self._deeper(knowledge, view, budget)
        model, enough = knowledge.model, 2 * max(self.lengths)
        requests = {r: c.v for r, c in enumerate(view.cache) if len(c.v) >= enough}
        if not requests:
            return Outcome({}, f"no request of {enough} tokens")
        claims: dict[str, list[Claim]] = {}
        for i, length in enumerate(self.lengths):
            if budget.spent():
                return Outcome(claims, f"lengths from {self.lengths[i]} on")
            here = claims[f"{length} tokens"] = []
            for request, v in requests.items():
                known = knowledge.plaintext.prefix(request, length)
                clear = model.trace(known).v if length else v[:0]
                maps = solve(clear, v[:length])
                (tokens,) = first_layer_tokens(model, maps, [v[length:]])
                here.append(
                    Claim(About.REQUEST_TOKENS, request, tokens, length, given=known)
                )
        return Outcome(claims)

    def _deeper(self, knowledge: Knowledge, view: View, budget: Budget) -> Outcome:
        request = longest_request(view)
        v = view.cache[request].v
        length = 2 * v.shape[-1]
        if len(v) <= length:
            return Outcome({}, f"no request of more than {length} tokens")
        known = knowledge.plaintext.prefix(request, length)
        maps = solve(knowledge.model.trace(known).v, v[:length])
        tokens = search(knowledge.model, mapped_reading(maps, v), known, budget)
        claims = [Claim(About.REQUEST_TOKENS, request, tokens, length, given=known)]
        return Outcome({f"{length} tokens": claims}, cut_of(claims, len(v) - length))


class KnownMap(Attack):
    """Given as many of a request's first tokens as a head has features, and one more, as
    a system prompt is long, computes their K and V with the public model, solves the
    map of each head at any layer, and decodes all else that is cached under that key:
    the rest of the request, and all others.

    Source: measured in this project, as `KnownPrefix`.
    """

    name = "map from a known prefix"
    adversary = "A1"
    given_text = True

    def run(self, knowledge: Knowledge, view: View, budget: Budget) -> Outcome:
        model, own = knowledge.model, longest_request(view)
        seen = heads_of(view.cache[own])
        head_dim = seen.shape[-1]
        claims = {}
        for length in (head_dim + 1, 3 * head_dim // 2, 2 * head_dim):
            if length >= len(seen):
                return Outcome(claims, f"no request of more than {length} tokens")
            clear = heads_of(model.trace(knowledge.plaintext.prefix(own, length)))
            maps = solve(seen[:length], clear)
            claims[f"{length} tokens"] = [
                decoded(model, maps, cache, request, length if request == own else 0)
                for request, cache in enumerate(view.cache)
            ]
        return Outcome(claims)


class Neighbour(Attack):
    """Another tenant, who knows its own request, the longest of a common batch, solves
    the map from it and reads the others.

    The key is the engine's and not the request's, so any request of the tenant's would
    do, in any batch. Source: chosen plaintext as in KV collision+ (arXiv 2508.09442).
    """

    name = "another tenant's known plaintext"
    adversary = "A1"
    given_text = True

    def run(self, knowledge: Knowledge, view: View, budget: Budget) -> Outcome:
        if len(view.batch) < 2:
            return Outcome({}, "no two requests were prefilled in one step")
        sizes = [len(cache.v) for cache in view.batch]
        own = sizes.index(max(sizes))
        text = knowledge.plaintext.prefix(own, sizes[own])
        maps = solve(knowledge.model.trace(text).v, view.batch[own].v)
        values = {r: cache.v for r, cache in enumerate(view.batch) if r != own}
        return read_requests(knowledge, maps, values, budget, given=text)
