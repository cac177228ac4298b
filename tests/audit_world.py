"""An encoded engine without vLLM: what its accelerator would hold, from transformers.

The planted cases of the attacks are built from it, for any codec. `affine` is a
plain reference of the codec of that name: for an invertible A per KV head q -> q A
and k -> (k + a) A^-T, for another B v -> (v + b) B.
"""

import itertools
from collections.abc import Callable, Sequence

import torch

from scx.audit.capture import Border, Capture, Step
from scx.audit.interface import Knowledge, Plaintext
from scx.audit.public_model import LayerModel, PublicModel
from scx.codecs import rows
from scx.codecs.permutation import encode_features

Heads = torch.Tensor
Codec = Callable[[Heads, Heads, Heads], tuple[Heads, Heads, Heads]]

CONDITION = 4.0


def clear(kv_heads: int, head_dim: int, seed: int) -> Codec:
    return lambda q, k, v: (q, k, v)


def permutation(kv_heads: int, head_dim: int, seed: int) -> Codec:
    generator = torch.Generator().manual_seed(seed)
    key = torch.stack(
        [torch.randperm(head_dim, generator=generator) for _ in range(kv_heads)]
    )

    def encode(*parts: Heads) -> tuple[Heads, ...]:
        return tuple(
            encode_features(heads.flatten(1), key).view_as(heads) for heads in parts
        )

    return encode


def affine(kv_heads: int, head_dim: int, seed: int) -> Codec:
    generator = torch.Generator().manual_seed(seed)

    def invertible() -> torch.Tensor:
        shape = (kv_heads, head_dim, head_dim)
        left, right = (
            torch.linalg.qr(torch.randn(shape, generator=generator)).Q for _ in "ab"
        )
        values = torch.logspace(0, 1, head_dim, base=CONDITION)
        return left @ (values[:, None] * right)

    maps, value_maps = invertible(), invertible()
    offset, value_offset = torch.randn(2, kv_heads, head_dim, generator=generator)

    def encode(q: Heads, k: Heads, v: Heads) -> tuple[Heads, Heads, Heads]:
        group = q.shape[1] // kv_heads
        of_query = maps.repeat_interleave(group, 0)
        inverse = torch.linalg.inv(maps).mT
        return (
            torch.einsum("tnd,nde->tne", q, of_query),
            torch.einsum("tmd,mde->tme", k + offset, inverse),
            torch.einsum("tmd,mde->tme", v + value_offset, value_maps),
        )

    return encode


def capture(
    public: PublicModel,
    requests: Sequence[torch.Tensor],
    layers: Sequence[int],
    make: Callable[[int, int, int], Codec],
    decoded: int = 2,
) -> Capture:
    """What would be recorded of `requests` (T,) if their last `decoded` tokens had been
    generated one by one."""
    config = public.causal.config
    models = [public.layer(i) for i in range(config.num_hidden_layers)]
    shape = (config.num_key_value_heads, config.head_dim)
    codecs = {i: make(*shape, seed=i) for i in layers}
    # One key per layer, as in an engine; row orders are fresh each time.
    alone = []
    for ids in requests:
        whole = _step(models, [ids], codecs)
        cuts = [0, *range(len(ids) - decoded, len(ids) + 1)]
        parts = [_rows(whole, a, b) for a, b in itertools.pairwise(cuts)]
        alone.append([_sent(models, part) for part in parts])
    together = _step(models, [ids[:-decoded] for ids in requests], codecs)
    return Capture(
        layers=tuple(layers),
        num_layers=len(models),
        codec=make.__name__,
        alone=alone,
        together=[_sent(models, together)],
    )


def knowledge(
    public: PublicModel, layer: int, recorded: Capture, text: torch.Tensor
) -> Knowledge:
    plaintext = Plaintext([recorded.ids(r) for r in range(len(recorded.alone))])
    return Knowledge(public, public.layer(layer), text, plaintext)


def _step(
    models: list[LayerModel], texts: Sequence[torch.Tensor], codecs: dict[int, Codec]
) -> Step:
    step = Step(torch.cat(list(texts)), torch.cat([torch.arange(len(t)) for t in texts]))
    for index, model in enumerate(models):
        states = [model.trace(text) for text in texts]
        step.hidden[index] = torch.cat([s.hidden for s in states])
        q, k, v = (torch.cat([getattr(s, x) for s in states]) for x in "qkv")
        if index in codecs:
            q, k, v = codecs[index](q, k, v)
            nothing = torch.zeros_like(q)
            step.border[index] = Border(nothing, nothing, q, nothing, nothing.flatten(1))
        step.k[index], step.v[index] = k, v
    return step


def _rows(step: Step, start: int, end: int) -> Step:
    """A step of some of the rows."""
    here = slice(start, end)
    part = Step(step.input_ids[here], step.positions[here])
    for name in ("hidden", "k", "v"):
        getattr(part, name).update(
            {i: rows[here] for i, rows in getattr(step, name).items()}
        )
    part.border.update(
        {
            i: Border(**{name: rows[here] for name, rows in vars(border).items()})
            for i, border in step.border.items()
        }
    )
    return part


def _sent(models: list[LayerModel], step: Step) -> Step:
    """The step with its rows sent in a fresh order and projected."""
    for index, border in list(step.border.items()):
        pi = rows.draw_permutation(len(step.input_ids))
        sent = rows.encode_rows(step.hidden[index], pi)
        attention = models[index].attention
        with torch.no_grad():
            qkv = torch.cat(
                [getattr(attention, f"{name}_proj")(sent) for name in "qkv"], dim=1
            )
        step.border[index] = Border(sent, qkv, border.q, border.attention, border.output)
    return step
