"""Rotary position embeddings: the table of cosines and sines that a layer uses.

`obstacles` reads a model's configuration, before anything is built; `tables_of` takes
the tables out of what vLLM built (vllm/model_executor/layers/rotary_embedding).
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import nn

from scx.errors import SCXUnsupportedError

TABLES = ("default", "dynamic", "linear", "llama3", "longrope", "ntk", "yarn")
"""Values of rope_type for which vLLM's class is a table of cosines and sines."""

_NOT_A_TABLE = {
    "mrope_section": "turns by three positions per token",
    "use_fope": "learns its frequencies",
}
"""What in rope_parameters makes another class of a rope_type above."""


class Table(NamedTuple):
    """All that a layer's RoPE needs beside heads and positions."""

    cos_sin_cache: torch.Tensor
    """(rows, R): cosines, then sines, of each position. A view of vLLM's own."""
    is_neox_style: bool


def obstacles(config: Any, max_model_len: int) -> Iterator[str]:
    """Why the rotary embedding of a text model cannot be encoded, with the way out.

    `config` is the Hugging Face configuration, in which vLLM has brought older spellings
    to rope_parameters; `max_model_len` is the engine's. Some models have a set of
    parameters for each type of layer.
    """
    rope = getattr(config, "rope_parameters", None) or {}
    by_layer = [each for each in rope.values() if isinstance(each, Mapping)]
    for each in by_layer or [rope]:
        yield from _obstacles(each, config, max_model_len)


def _obstacles(rope: Mapping[str, Any], config: Any, max_model_len: int) -> Iterator[str]:
    kind = rope.get("rope_type", "default")
    if kind not in TABLES:
        yield f"rope_type={kind!r} is not encoded: use a model with {', '.join(TABLES)}"
    elif found := [name for name in _NOT_A_TABLE if rope.get(name)]:
        yield (
            f"{found[0]} in rope_parameters {_NOT_A_TABLE[found[0]]}, which is not "
            "encoded: use a model without it"
        )
    elif max_model_len > (rows := _rows(rope, config, max_model_len)):
        yield _beyond(max_model_len, rows)


def tables_of(
    embeddings: Sequence[nn.Module | None], max_model_len: int
) -> tuple[list[torch.Tensor], bool]:
    """The table (rows, R) of each layer, and whether their heads turn in neox style.

    None stands for a layer without RoPE, whose table is one row by which nothing turns.
    Layers that share an embedding get the same tensor. Raises SCXUnsupportedError for an
    embedding that is more than a table or has fewer rows than `max_model_len`, and for
    embeddings that differ in more than their angles.
    """
    found = {
        id(each): _table_of(each, max_model_len)
        for each in embeddings
        if each is not None
    }
    if not found:
        found[id(None)] = Table(_unturned(2), True)
    first, *others = found.values()
    width = first.cos_sin_cache.shape[-1]
    if any(
        other.is_neox_style != first.is_neox_style
        or other.cos_sin_cache.shape[-1] != width
        for other in others
    ):
        raise SCXUnsupportedError(
            "rotary embeddings that turn other features in other layers are not encoded: "
            "use a model in which they differ in their angles only"
        )
    found.setdefault(id(None), Table(_unturned(width).to(first.cos_sin_cache), True))
    tables = [found[id(embedding)].cos_sin_cache for embedding in embeddings]
    return tables, first.is_neox_style


def _unturned(width: int) -> torch.Tensor:
    """A table of one row (1, `width`): each cosine is 1 and each sine 0."""
    return torch.cat([torch.ones(1, width // 2), torch.zeros(1, width // 2)], dim=-1)


def _table_of(rotary: Any, max_model_len: int) -> Table:
    from vllm.model_executor.layers.rotary_embedding.base import RotaryEmbedding
    from vllm.model_executor.layers.rotary_embedding.phi3_long_rope_scaled_rope import (
        Phi3LongRoPEScaledRotaryEmbedding as LongRoPE,
    )

    if type(rotary) is LongRoPE:
        # The short table, then the long one; vLLM chose one for the whole engine.
        both: Any = rotary.long_short_cos_sin_cache
        short = rotary.original_max_position_embeddings
        table = Table(both[short:] if rotary.use_long_rope else both[:short], True)
    elif (
        isinstance(rotary, RotaryEmbedding)
        and type(rotary).forward_native is RotaryEmbedding.forward_native
    ):
        table = Table(rotary.cos_sin_cache, rotary.is_neox_style)
    else:
        raise SCXUnsupportedError(
            f"the rotary embedding {type(rotary).__name__} is more than a table of "
            "cosines and sines, so it is not encoded: use a model with another"
        )
    if max_model_len > (rows := len(table.cos_sin_cache)):
        raise SCXUnsupportedError(_beyond(max_model_len, rows))
    return table


def _rows(rope: Mapping[str, Any], config: Any, max_model_len: int) -> int:
    """How many positions the table of vLLM's class has; what is missing fails there."""
    # Cohere's tables are as long as model_max_length, if the configuration has one.
    positions = getattr(config, "model_max_length", None) or getattr(
        config, "max_position_embeddings", 8192
    )
    original = rope.get("original_max_position_embeddings", positions)
    factor = rope.get("factor") or 1.0
    match rope.get("rope_type", "default"):
        case "linear":
            return math.ceil(positions * factor)
        case "yarn":
            return math.ceil(original * factor)
        case "longrope" if max_model_len <= original:
            return original
        case _:
            return positions


def _beyond(max_model_len: int, rows: int) -> str:
    return (
        f"max_model_len={max_model_len} goes beyond the rotary table, which has {rows} "
        f"positions: set it to {rows} at most"
    )
