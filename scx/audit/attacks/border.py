"""The border: rows leave the secure device as they came, so bytes give their order,
and the order gives the key."""

import torch

from scx.audit.attacks.affine_map import decoded, heads_of, read_requests, solve
from scx.audit.interface import About, Attack, Budget, Claim, Knowledge, Outcome
from scx.audit.public_model import LayerModel
from scx.audit.views import BorderStep, View


def order_by_bytes(step: BorderStep) -> torch.Tensor:
    """The sent row (T,) that each row of the batch is, or 0 if none is.

    Equal rows are interchangeable: qkv_proj returns the same for both.
    """
    sent = {row.numpy().tobytes(): i for i, row in enumerate(step.rows)}
    return torch.tensor([sent.get(row.numpy().tobytes(), 0) for row in step.hidden])


def clear_heads(model: LayerModel, step: BorderStep) -> torch.Tensor:
    """Keys after RoPE, then values (T, 2M, D): what qkv_proj returned, put in order.

    Of the model only its rotary table is used, which is in no weight.
    """
    order = order_by_bytes(step)
    k = model.rotate(step.keys_sent()[order], step.positions)
    return torch.cat([k, step.values_sent()[order]], dim=1)


def longest_prefill(view: View) -> tuple[int, BorderStep]:
    """The longest prefill that ran alone, with its request."""
    return max(view.prefills(), key=lambda pair: len(pair[1].rows))


class RowOrder(Attack):
    """A step's rows come in the batch's order and leave in a secret one, bit for bit the
    same. Needs no weights and no text. Source: measured in this project.
    """

    name = "row order, by comparing bytes"
    adversary = "A2"
    uses_weights = False

    def run(self, knowledge: Knowledge, view: View, budget: Budget) -> Outcome:
        claims = [
            Claim(About.ROW_ORDER, index, order_by_bytes(step))
            for index, step in enumerate(view.steps)
            if len(step.rows) > 1
        ]
        return Outcome({"": claims})


class BorderMap(Attack):
    """Once the rows of one prefill are in order, its K and V are known before and after
    they were encoded. Least squares gives the map of each head, and with it the cache
    of every other request under that key. Needs no weights and no text.

    Source: measured in this project. Least squares on known rows is the anchor attack
    of GELO (arXiv 2603.05035, section 4.3).
    """

    name = "map from one step at the border"
    adversary = "A2"
    uses_weights = False

    def run(self, knowledge: Knowledge, view: View, budget: Budget) -> Outcome:
        own, step = longest_prefill(view)
        model = knowledge.model
        maps = solve(heads_of(step), clear_heads(model, step))
        claims = [
            decoded(model, maps, cache, request)
            for request, cache in enumerate(view.cache)
            if request != own
        ]
        return Outcome({"": claims})


class BorderTokens(Attack):
    """The same map, and with the weights the tokens of every other request.

    Source: `BorderMap`, then vocabulary matching (arXiv 2505.18332).
    """

    name = "map from one step at the border, then matching"
    adversary = "A2"

    def run(self, knowledge: Knowledge, view: View, budget: Budget) -> Outcome:
        own, step = longest_prefill(view)
        _, clear = clear_heads(knowledge.model, step).chunk(2, dim=1)
        values = {r: cache.v for r, cache in enumerate(view.cache) if r != own}
        return read_requests(knowledge, solve(clear, step.v), values, budget)
