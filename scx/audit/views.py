"""What each adversary holds of one layer.

A1 reads KV cache blocks. A2 reads A1's and all that crosses for the encoded
layers. A3 reads all of the accelerator's memory. Positions, the length of each
request and where it begins in a batch are the scheduler's, hence plain to all.
"""

import dataclasses
from dataclasses import dataclass
from typing import Any, Literal, TypeVar

import torch

from scx.audit.capture import Capture, Step

Adversary = Literal["A1", "A2", "A3"]
ADVERSARIES: tuple[Adversary, ...] = ("A1", "A2", "A3")


@dataclass(frozen=True)
class Cache:
    """Keys after RoPE and values of one request, in the order of positions: (T, M, D)."""

    k: torch.Tensor
    v: torch.Tensor


@dataclass(frozen=True)
class BorderStep:
    """One step of the audited layer at the border.

    `rows` and `qkv` are in the order in which the rows were sent, all others in
    that of the batch. Shapes are those of `capture.Border` and `capture.Step`.
    """

    request: int | None
    """The request that ran alone, or None for a step of the common batch."""
    positions: torch.Tensor
    hidden: torch.Tensor
    rows: torch.Tensor
    qkv: torch.Tensor
    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor
    attention: torch.Tensor
    output: torch.Tensor

    def values_sent(self) -> torch.Tensor:
        """The values in what qkv_proj returned, in the order sent: (T, M, D)."""
        return self.qkv[:, -self.v[0].numel() :].reshape(self.v.shape)

    def keys_sent(self) -> torch.Tensor:
        """The keys in what qkv_proj returned, before RoPE, in the order sent."""
        size = self.v[0].numel()
        return self.qkv[:, -2 * size : -size].reshape(self.k.shape)


@dataclass(frozen=True)
class View:
    """Float32 tensors of one encoded layer; empty where an adversary is blind."""

    layer: int
    """The layer that is audited."""
    encoded: tuple[int, ...]
    """All layers that are encoded."""
    caches: list[dict[int, Cache]]
    """A1: by layer, encoded or not; one dictionary per request."""
    batch: list[Cache]
    """A1: the audited layer's, of the requests that one common step prefilled whole."""
    steps: list[BorderStep]
    """A2: those of requests that ran alone, then those of the common batch."""
    clear_hidden: dict[int, list[torch.Tensor]]
    """A3: inputs of layers that are not encoded, (T, H) per request."""
    input_ids: list[torch.Tensor]
    """A3: (T,) per request, which the embedding reads."""

    @property
    def cache(self) -> list[Cache]:
        """A1: the audited layer's, one per request."""
        return [caches[self.layer] for caches in self.caches]

    @property
    def lowest_clear(self) -> int | None:
        """The lowest layer that is not encoded, or None."""
        layers = self.caches[0]
        return min((i for i in layers if i not in self.encoded), default=None)

    def prefills(self) -> list[tuple[int, BorderStep]]:
        """Request and step of the prefills that ran alone."""
        return [
            (step.request, step)
            for step in self.steps
            if step.request is not None and step.positions[0] == 0
        ]


def view_of(capture: Capture, layer: int, adversary: Adversary) -> View:
    """What `adversary` holds of `layer`."""
    requests = range(len(capture.alone))
    everywhere = range(capture.num_layers)
    clear = [i for i in everywhere if i not in capture.layers]

    def joined(name: str, request: int, index: int) -> torch.Tensor:
        parts = [getattr(step, name)[index] for step in capture.alone[request]]
        return torch.cat(parts).float()

    def cache(request: int, index: int) -> Cache:
        return Cache(joined("k", request, index), joined("v", request, index))

    sees_border, sees_memory = adversary in ("A2", "A3"), adversary == "A3"
    return View(
        layer=layer,
        encoded=capture.layers,
        caches=[{i: cache(r, i) for i in everywhere} for r in requests],
        batch=_batch(capture, layer),
        steps=border_steps(capture, layer) if sees_border else [],
        clear_hidden={i: [joined("hidden", r, i) for r in requests] for i in clear}
        if sees_memory
        else {},
        input_ids=[capture.ids(r) for r in requests] if sees_memory else [],
    )


def _batch(capture: Capture, layer: int) -> list[Cache]:
    step = capture.together[0]
    starts = (step.positions == 0).nonzero().flatten().tolist()
    lengths = [len(steps[0].positions) for steps in capture.alone]
    return [
        Cache(step.k[layer][a : a + n].float(), step.v[layer][a : a + n].float())
        for a, n in zip(starts, lengths, strict=False)
        if a + n <= len(step.positions)
    ]


def border_steps(capture: Capture, layer: int) -> list[BorderStep]:
    """Every step of `layer` at the border, in the order of `View.steps`."""
    alone = [
        _border_step(step, layer, request)
        for request, steps in enumerate(capture.alone)
        for step in steps
    ]
    return alone + [_border_step(step, layer, None) for step in capture.together]


def _border_step(step: Step, layer: int, request: int | None) -> BorderStep:
    border = dataclasses.asdict(step.border[layer])
    return BorderStep(
        request=request,
        positions=step.positions,
        hidden=step.hidden[layer].float(),
        k=step.k[layer].float(),
        v=step.v[layer].float(),
        **{name: tensor.float() for name, tensor in border.items()},
    )


Nested = TypeVar("Nested")


def fresh_random(view: Nested, generator: torch.Generator) -> Nested:
    """`view` with each floating-point tensor drawn afresh, of the same shape, mean
    and standard deviation. Positions and token ids stay.
    """

    def drawn(value: Any) -> Any:
        if isinstance(value, torch.Tensor) and value.is_floating_point():
            noise = torch.randn(value.shape, generator=generator)
            return noise * value.std(correction=0) + value.mean()
        if isinstance(value, list):
            return [drawn(item) for item in value]
        if isinstance(value, dict):
            return {key: drawn(item) for key, item in value.items()}
        if dataclasses.is_dataclass(value) and not isinstance(value, type):
            changes = {
                f.name: drawn(getattr(value, f.name)) for f in dataclasses.fields(value)
            }
            return dataclasses.replace(value, **changes)
        return value

    return drawn(view)
