"""What encoding should cost, from a model's shape and a few figures of a machine.

For one encoded layer, T tokens in a step, H columns of hidden_states, N query
heads and M key/value heads of D features on each rank:

    row      = (2H + 2(N + 2M)D + 2ND) / 2 x element size: bytes in each direction
    rows     = T + FILL x min(T, GROUP_ROWS)
    seconds  = trips (hop + flag x chunks(T)) + rows x row / min(bus, workers x core)

There are three trips, and two for a single row, which the host is not asked to order.
Each costs an empty hop, one flag per chunk, and its rows, which leave and come back at
the same time, but for the first group: nothing comes back before it has left. The host's
workers hide behind the bus if they are enough. The defaults come from the measurements
in docs/performance.md.
"""

import argparse
import json
import math
import reprlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from scx.errors import SCXConfigError
from scx.kernels.host.cores import workers_for
from scx.kernels.machine import Machine, host_limit
from scx.kernels.protocol import GROUP_ROWS, chunk_rows_of

FILL = 0.6
"""How much of the time of two directions at once one direction takes, both ways."""
POSITION_BYTES = 8
LARGEST = 1 << 20
"""The largest size accepted from a config.json. No model comes near it."""


def run(options: argparse.Namespace) -> bool:
    """Print what encoding should cost. Raises SCXConfigError for a model or layers of
    which that cannot be said."""
    # Here, so that `scx --help` needs nothing that is not installed.
    from scx import keys

    shape = Shape.read(options.model, options.tensor_parallel_size)
    workers = workers_for(options.cores, options.tensor_parallel_size)
    machine = Machine(options.hop, options.flag, options.bus, options.core, workers)
    config = keys.parse_config({keys.ENC_LAYERS: options.layers})
    layers = len(config.layers_of(shape.num_layers))
    print(
        f"{layers} of {shape.num_layers} layers encoded by permutation, on each rank, "
        f"with {workers} workers of {options.cores} cores:"
    )
    print("\n".join(table(shape, layers, machine)))
    if limit := host_limit(machine):
        print(limit)
    for name in _unknown(_read_config(options.model).get("architectures")):
        print(f"{name} may not be encoded: scx check --model says whether it is")
    return True


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

        If the file has a text_config, the sizes are taken from there. As in vLLM, if
        num_key_value_heads is absent or null it equals num_attention_heads, and head_dim
        is derived. Raises SCXConfigError if the file is missing, if a size is missing or
        invalid, or if the heads cannot be split over the ranks.
        """
        config = _read_config(model)
        text = config.get("text_config")
        sizes = text if isinstance(text, dict) else config

        def size(name: str, default: int | None = None) -> int:
            value = default if sizes.get(name) is None else sizes[name]
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
                f"--tensor-parallel-size {ranks}: {heads} heads with {kv_heads} "
                "key/value heads cannot be split over that many ranks"
            )
        return cls(
            num_layers=size("num_hidden_layers"),
            hidden_size=hidden_size,
            num_heads=heads // ranks,
            num_kv_heads=max(1, kv_heads // ranks),
            head_dim=size("head_dim", hidden_size // heads),
        )

    @property
    def query_size(self) -> int:
        """Columns of the queries, and of the attention's output."""
        return self.num_heads * self.head_dim

    @property
    def qkv_size(self) -> int:
        """Columns of queries, keys and values."""
        return self.query_size + 2 * self.num_kv_heads * self.head_dim

    def row_bytes(self) -> int:
        """Bytes per token and encoded layer, in each direction."""
        columns = self.hidden_size + self.qkv_size + self.query_size
        return columns * self.element_size


def _unknown(architectures: Any) -> list[str]:
    """Those of some architectures that have no row of their own; vLLM has other names for
    some that do."""
    from scx.plugin.architectures import ARCHITECTURES

    known = {each.name for each in ARCHITECTURES}
    names = architectures if isinstance(architectures, list) else []
    return [str(name) for name in names if name not in known]


def _read_config(model: Path) -> dict[str, Any]:
    """A model's config.json. Raises SCXConfigError."""
    try:
        config = json.loads((model / "config.json").read_text())
    except FileNotFoundError as error:
        raise SCXConfigError(
            f"--model {model}: there is no config.json; a local folder is needed, as hub "
            "names are not looked up"
        ) from error
    except (OSError, ValueError, RecursionError) as error:
        raise SCXConfigError(
            f"--model {model}: config.json cannot be read ({error!r})"
        ) from error
    if not isinstance(config, dict):
        raise SCXConfigError(f"--model {model}: config.json is not a JSON object")
    return config


def layer_seconds(shape: Shape, tokens: int, machine: Machine) -> float:
    """What one encoded layer adds to a step of `tokens` tokens."""
    trips = 2 if tokens == 1 else 3
    chunks = math.ceil(tokens / chunk_rows_of(tokens))
    rows = tokens + FILL * min(tokens, GROUP_ROWS)
    size = rows * (shape.row_bytes() + POSITION_BYTES)
    return (
        trips * (machine.hop_seconds + chunks * machine.flag_seconds)
        + size / machine.bytes_per_second
    )


def table(shape: Shape, layers: int, machine: Machine) -> list[str]:
    """A table for people, for steps of 1 to 16,384 tokens."""
    lines = [f"{'tokens':>8} {'MB each way':>12} {'ms per step':>11}"]
    for tokens in (1, 8, 64, 256, 1024, 4096, 16384):
        megabytes = layers * tokens * shape.row_bytes() / 1e6
        milliseconds = layers * layer_seconds(shape, tokens, machine) * 1e3
        lines.append(f"{tokens:>8,} {megabytes:>12,.2f} {milliseconds:>11,.3f}")
    return lines
