"""What lies in the clear in the accelerator's memory and in the cache."""

import torch

from scx.audit.attacks.vocabulary import VocabularyMatching
from scx.audit.interface import Attack, Budget, Knowledge, Outcome, request_tokens
from scx.audit.matching import Reading, hidden_of
from scx.audit.public_model import States
from scx.audit.views import Cache, View


class TokenIds(Attack):
    """The token ids that the embedding on the accelerator reads."""

    name = "token ids in memory"
    adversary = "A3"
    scope = "whole model"
    uses_weights = False
    random_control = False

    def run(self, knowledge: Knowledge, view: View, budget: Budget) -> Outcome:
        return Outcome({"": request_tokens(view.input_ids)})


class LowestClearLayer(VocabularyMatching):
    """Vocabulary matching, none, on the lowest layer that is not encoded."""

    scope = "whole model"

    def run(self, knowledge: Knowledge, view: View, budget: Budget) -> Outcome:
        if view.lowest_clear is None:
            return Outcome({}, "every layer is encoded")
        model = knowledge.public.layer(view.lowest_clear)
        return self.match(model, self.readings_of(view, view.lowest_clear), budget)

    def readings_of(self, view: View, layer: int) -> list[tuple[int, Reading]]:
        """As `readings`, of a layer in the clear."""
        raise NotImplementedError


class ClearCache(LowestClearLayer):
    """On its K and V, which the cache holds as they are."""

    name = "cached K, V of a layer in the clear"
    adversary = "A1"

    def readings_of(self, view: View, layer: int) -> list[tuple[int, Reading]]:
        caches = [layers[layer] for layers in view.caches]
        return [
            (r, Reading(_plain_kv, _plain_kv(cache))) for r, cache in enumerate(caches)
        ]


class ClearHidden(LowestClearLayer):
    """On its input."""

    name = "input of a layer in the clear"
    adversary = "A3"

    def readings_of(self, view: View, layer: int) -> list[tuple[int, Reading]]:
        inputs = view.clear_hidden[layer]
        return [(r, Reading(hidden_of, rows)) for r, rows in enumerate(inputs)]


def _plain_kv(states: States | Cache) -> torch.Tensor:
    return torch.cat([states.k.flatten(1), states.v.flatten(1)], dim=1)
