"""Linear inversion of K and V."""

from collections.abc import Iterable

import torch
from torch.nn.functional import normalize

from scx.audit.attacks.linking import link
from scx.audit.interface import Attack, Budget, Knowledge, Outcome, request_tokens
from scx.audit.matching import nearest_each
from scx.audit.public_model import LayerModel
from scx.audit.views import View


def invert(
    model: LayerModel, requests: Iterable[tuple[torch.Tensor, torch.Tensor]]
) -> tuple[torch.Tensor, ...]:
    """Token ids (T,) of each request from its keys before RoPE and values (T, M, D).

    Solves the projections of both at once for the layer's input, least squares of
    minimum norm, and takes the embedding of the nearest direction among all tokens,
    each seen through the same projections.
    """
    weight, bias = model.keys_and_values()
    inverse = torch.linalg.pinv(weight)
    solved = [
        (torch.cat([k.flatten(1), v.flatten(1)], dim=1) - bias) @ inverse.T
        for k, v in requests
    ]
    table = model.table @ (inverse @ weight).T
    return nearest_each([normalize(part) for part in solved], normalize(table))


class Inversion(Attack):
    """Cached K with RoPE undone at its known positions, and V, taken as if they were in
    the clear.

    Source: KV inversion (arXiv 2508.09442, section on inversion), the system of K and
    V stacked. Exact in layer 0; deeper, it finds tokens whose embedding is still the
    main part of the state.
    """

    name = "linear inversion of K and V"
    adversary = "A1"

    def run(self, knowledge: Knowledge, view: View, budget: Budget) -> Outcome:
        model = knowledge.model
        unturned = [
            (model.unrotate(cache.k, torch.arange(len(cache.k))), cache.v)
            for cache in view.cache
        ]
        return Outcome({"": request_tokens(invert(model, unturned))})


class LinkedInversion(Attack):
    """The same on what qkv_proj returned, once linking has put its rows in order:
    neither RoPE nor a feature key stands before it.

    Source: KV inversion (arXiv 2508.09442) after linking, which is ours.
    """

    name = "linear inversion after linking"
    adversary = "A2"

    def run(self, knowledge: Knowledge, view: View, budget: Budget) -> Outcome:
        linked = []
        for _, step in view.prefills():
            order, _ = link(step)
            linked.append((step.keys_sent()[order], step.values_sent()[order]))
        return Outcome({"": request_tokens(invert(knowledge.model, linked))})
