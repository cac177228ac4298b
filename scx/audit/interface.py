"""The one interface of all attacks."""

import time
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from enum import Enum
from typing import Literal

import torch

from scx.audit.public_model import LayerModel, PublicModel
from scx.audit.views import Adversary, View

WHOLE_MODEL = "all"
"""In reports, in place of a layer: for attacks on all layers at once."""


class About(Enum):
    """What a claim is about, hence how it is scored."""

    REQUEST_TOKENS = "tokens of a request"
    """Token ids by position."""
    STEP_TOKENS = "tokens of a step"
    """Token ids by row, in the order of the batch."""
    SENT_TOKENS = "tokens of the rows sent"
    """Token ids by row, in the order in which the rows were sent."""
    CACHE_BAG = "tokens in cache slots of no known order"
    """Token ids by slot, compared as one multiset a request."""
    STEP_BAG = "which tokens are in a step"
    """A set of token ids."""
    TEXT = "text of a request"
    """A sequence of token ids, compared by longest common subsequence."""
    ROW_ORDER = "order of the rows sent"
    """The sent row that each row of the batch is."""
    COLUMNS = "features of V"
    """(M, D): the clear feature that each encoded feature of a KV head is."""
    EQUALITY = "pairs of equal tokens in a request"
    """By position, the first position that holds the same token."""
    VECTORS = "cached vectors decoded"
    """(T, 2M, D), float32: by row the keys of a request before RoPE, then its values,
    in the clear."""


NO_TOKENS = torch.empty(0, dtype=torch.int64)


@dataclass(frozen=True)
class Claim:
    """What an attack says about one request or step."""

    about: About
    index: int
    """The request, or the step in `View.steps`."""
    values: torch.Tensor
    """As `About` says, int64 by default, for the rows from `first` on."""
    first: int = 0
    """The row of the first value; the others follow it."""
    given: torch.Tensor = NO_TOKENS
    """Token ids that the attack was given with their encoding. Knowing them again needs
    no weights, since equal tokens stay equal; it counts as chance."""


def request_tokens(tokens: Iterable[torch.Tensor]) -> list[Claim]:
    """Claims about all tokens of the requests, in their order."""
    return [Claim(About.REQUEST_TOKENS, r, values) for r, values in enumerate(tokens)]


@dataclass(frozen=True)
class Outcome:
    """The claims of one run, by label, in the order in which they are reported.

    A label is what varies within the attack, as the length of a known prefix.
    """

    claims: Mapping[str, Sequence[Claim]]
    cut: str = ""
    """What the budget left out, or nothing."""


class Plaintext:
    """Text that an attack is given. Its docstring says how much of it, and why."""

    def __init__(self, requests: Sequence[torch.Tensor]) -> None:
        self._requests = requests

    def prefix(self, request: int, tokens: int) -> torch.Tensor:
        """The first `tokens` token ids of a request."""
        return self._requests[request][:tokens]


@dataclass(frozen=True)
class Knowledge:
    """What the adversary knows beside the view: the weights and public text."""

    public: PublicModel
    model: LayerModel
    """The same weights up to the audited layer."""
    public_text: torch.Tensor
    """Token ids (n,) of a text that is not among the prompts."""
    plaintext: Plaintext


class Budget:
    """Seconds for a run, and the most candidates that it compares per token."""

    def __init__(self, seconds: float, candidates: int | None = None) -> None:
        self.candidates = candidates
        self._end = time.monotonic() + seconds

    def spent(self) -> bool:
        """Whether the time is over. A loop then ends and says what it left out."""
        return time.monotonic() >= self._end

    def part(self, share: float) -> "Budget":
        """A budget of a share of the time that is left."""
        return Budget((self._end - time.monotonic()) * share, self.candidates)


class Attack(ABC):
    """One attack on one layer. A docstring names its source and what it is given."""

    name: str
    adversary: Adversary
    """The weakest that can run it."""
    scope: Literal["any layer", "layer 0", "whole model"] = "any layer"
    given_text: bool = False
    """Whether it is given part of the text that the engine was."""
    uses_weights: bool = True
    """Whether other weights make a control."""
    random_control: bool = True
    """Whether random tensors in place of the view make a control."""

    @abstractmethod
    def run(self, knowledge: Knowledge, view: View, budget: Budget) -> Outcome:
        """Attack `view`. The claims are scored by `scoring`, never by the attack."""
