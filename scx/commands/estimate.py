"""What encoding should cost, from a model's shape and three figures of a machine.

For one encoded layer, T tokens in a step, H columns of hidden_states, N query
heads and M key/value heads of D features on each rank:

    bytes    = T (2H + 2(N + 2M)D + 2ND) / 2 x element size, in each direction
    seconds  = 3 (hop + flag x chunks(T)) + bytes / bus

Three trips, each of which costs an empty hop, a flag a chunk, and its rows
across the bus, both directions at once. The host's kernels hide behind the bus.
docs/performance.md has the measurements that the defaults come from.
"""

import json
import math
import reprlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from scx.errors import SCXConfigError
from scx.kernels.protocol import chunk_rows_of

POSITION_BYTES = 8
LARGEST = 1 << 20
"""The most that a size in a config.json can be. None comes near it."""


@dataclass(frozen=True)
class Machine:
    """What a trip costs, on each rank."""

    hop_seconds: float
    """An empty trip."""
    flag_seconds: float
    """Each chunk of rows."""
    bus_bytes_per_second: float
    """In each direction while both are in use, host kernels included."""


H100 = Machine(hop_seconds=9.3e-6, flag_seconds=0.3e-6, bus_bytes_per_second=23e9)
"""As measured with 16 cores and PCIe 5."""


@dataclass(frozen=True)
class Shape:
    """One decoder layer of one rank."""

    num_layers: int
    hidden_size: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    element_size: int = 2
    """Bytes."""

    @classmethod
    def read(cls, model: Path, ranks: int = 1) -> "Shape":
        """From a model's config.json, split over tensor-parallel ranks.

        The sizes are those of its text_config where it has one. As in vLLM, no or null
        num_key_value_heads are as many as query heads, and head_dim is derived.
        Raises SCXConfigError where the file is not there, lacks a field or has one that
        is no size, the heads cannot be split so, or the fused kernels do not serve the
        model.
        """
        config = _read_config(model)
        if config.get("model_type") == "qwen3":
            raise SCXConfigError(
                f"--model {model}: query and key norms run in plain torch operations, of "
                "which nothing is known here; models without them are allowed"
            )

        def size(name: str, default: int | None = None) -> int:
            value = default if config.get(name) is None else config[name]
            if type(value) is not int or not 1 <= value <= LARGEST:
                raise SCXConfigError(
                    f"--model {model}: {name}={reprlib.repr(value)} in config.json: a "
                    f"whole number from 1 to {LARGEST} is allowed"
                )
            return value

        heads = size("num_attention_heads")
        kv_heads = size("num_key_value_heads", heads)
        hidden_size = size("hidden_size")
        if heads % kv_heads:
            raise SCXConfigError(
                f"--model {model}: num_key_value_heads={kv_heads} in config.json: a "
                f"divisor of num_attention_heads={heads} is allowed"
            )
        if ranks < 1 or heads % ranks or (kv_heads % ranks and ranks % kv_heads):
            raise SCXConfigError(
                f"--tensor-parallel-size {ranks}: {heads} heads cannot be split so with "
                f"{kv_heads} key/value heads"
            )
        return cls(
            num_layers=size("num_hidden_layers"),
            hidden_size=hidden_size,
            num_heads=heads // ranks,
            num_kv_heads=max(1, kv_heads // ranks),
            head_dim=size("head_dim", hidden_size // heads),
        )

    def row_bytes(self) -> int:
        """What a token of one encoded layer sends across, in each direction."""
        query = self.num_heads * self.head_dim
        projection = query + 2 * self.num_kv_heads * self.head_dim
        return (self.hidden_size + projection + query) * self.element_size


def _read_config(model: Path) -> dict[str, Any]:
    """What config.json says of the language model. Raises SCXConfigError."""
    try:
        config = json.loads((model / "config.json").read_text())
        if not isinstance(config, dict):
            raise ValueError("no JSON object")
    except (OSError, ValueError, RecursionError) as error:
        raise SCXConfigError(
            f"--model {model}: a folder with a config.json that has hidden_size, "
            f"num_hidden_layers and num_attention_heads is allowed ({error!r})"
        ) from error
    text = config.get("text_config")
    return text if isinstance(text, dict) else config


def layer_seconds(shape: Shape, tokens: int, machine: Machine) -> float:
    """What one encoded layer adds to a step of so many tokens."""
    chunks = math.ceil(tokens / chunk_rows_of(tokens))
    size = tokens * (shape.row_bytes() + POSITION_BYTES)
    return (
        3 * (machine.hop_seconds + chunks * machine.flag_seconds)
        + size / machine.bus_bytes_per_second
    )


def table(shape: Shape, layers: int, machine: Machine) -> list[str]:
    """Lines for people: steps of one token to 16,384."""
    lines = [f"{'tokens':>8} {'MB each way':>12} {'ms a step':>10}"]
    for tokens in (1, 8, 64, 256, 1024, 4096, 16384):
        megabytes = layers * tokens * shape.row_bytes() / 1e6
        milliseconds = layers * layer_seconds(shape, tokens, machine) * 1e3
        lines.append(f"{tokens:>8,} {megabytes:>12,.2f} {milliseconds:>10,.3f}")
    return lines
