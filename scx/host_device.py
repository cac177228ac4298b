"""The host as secure device, without a wait in Python.

The accelerator runs `scx.kernels.exchange`, worker threads of this process run
`scx.kernels.host_worker`, and between them lies pinned memory that is allocated
once. So a step stays asynchronous for vLLM, can be captured in a CUDA graph,
and draws a fresh row permutation in each replay.
"""

import os
import threading
import weakref
from collections.abc import Sequence

import torch

from scx.codecs.interface import FeatureCodec
from scx.errors import SCXError
from scx.kernels import host_worker
from scx.kernels.host import host_kernels
from scx.kernels.host_worker import (
    DECODE_FEATURES,
    ENCODE_FEATURES,
    ENCODE_ROWS,
)
from scx.kernels.protocol import Mailbox
from scx.secure_device import Traffic

MAX_WORKERS = 16
# For the engine's own threads.
SPARE_CORES = 3


class HostDevice:
    """The secure memory and the workers of one rank, shared by its encoded layers."""

    def __init__(
        self,
        features: Sequence[FeatureCodec],
        cos_sin_cache: torch.Tensor,
        is_neox_style: bool,
        num_heads: int,
        hidden_size: int,
        max_tokens: int,
        dtype: torch.dtype,
        accelerator: torch.device,
        workers: int,
    ) -> None:
        """One codec of features for each encoded layer, in the order of their slots.

        `dtype` is that of the rows, `max_tokens` the most tokens of a step.
        Compiles the workers' loop, which takes seconds, and starts them.
        """
        kv_heads, head_dim = features[0].kv_heads, features[0].head_dim
        self.query_size, kv_size = num_heads * head_dim, kv_heads * head_dim
        self.kv_size = kv_size
        widths = {
            ENCODE_ROWS: hidden_size,
            ENCODE_FEATURES: self.query_size + 2 * kv_size,
            DECODE_FEATURES: self.query_size,
        }
        self.device = torch.device("cpu")
        self.max_tokens = max_tokens
        self.features = [each.to(self.device) for each in features]
        self.mailbox = Mailbox.allocate(max_tokens, max(widths.values()), dtype)
        self.sequence = torch.zeros(1, dtype=torch.int64, device=accelerator)
        self.arrivals = torch.zeros(1, dtype=torch.int32, device=accelerator)

        slots = range(len(features))
        hops = [[kind, slot, widths[kind]] for slot in slots for kind in range(3)]
        self.counters = torch.zeros(
            (len(slots), 5), dtype=torch.int64, device=self.device
        )
        self._claims = torch.zeros(1, dtype=torch.int64, device=self.device)
        self._stop = torch.zeros(1, dtype=torch.int64, device=self.device)
        words = torch.zeros(
            (len(slots), max_tokens), dtype=torch.uint64, device=self.device
        )
        words_left = torch.zeros(len(slots), dtype=torch.int64, device=self.device)
        codec = features[0].name
        tables = zip(*(each.tables for each in self.features), strict=True)
        pack = host_kernels(dtype, codec).pack
        encoding_keys, decoding_keys = (pack(torch.stack(layers)) for layers in tables)
        arguments = (
            self._stop.data_ptr(),
            self.mailbox.bell.data_ptr(),
            self._claims.data_ptr(),
            self.mailbox.ready.data_ptr(),
            self.mailbox.done.data_ptr(),
            words_left.data_ptr(),
            _elements(self.mailbox.inbox),
            _elements(self.mailbox.outbox),
            self.mailbox.positions.numpy(),
            torch.tensor(hops, dtype=torch.int64, device=self.device).numpy(),
            encoding_keys,
            decoding_keys,
            cos_sin_cache.to(self.device, torch.float32).contiguous().numpy(),
            num_heads,
            is_neox_style,
            words.numpy(),
            words_left.numpy(),
            self.counters.numpy(),
        )
        serve = host_worker.worker_loop(dtype, codec)
        # The threads hold the arrays; these tensors are only looked at through them.
        self._threads = [
            threading.Thread(
                target=serve,
                args=(worker, *arguments),
                name=f"scx-host-{worker}",
                daemon=True,
            )
            for worker in range(workers)
        ]
        for thread in self._threads:
            thread.start()
        self._finalizer = weakref.finalize(self, _stop, self._stop, self._threads)

    def close(self) -> None:
        """Stop the workers."""
        self._finalizer()

    def exchange(
        self, source: torch.Tensor, hop: int, positions: torch.Tensor | None = None
    ) -> torch.Tensor:
        """What the host makes of the rows of `source` (T, W) in this hop: (T, W).

        Raises SCXError for more rows than the staging memory holds.
        """
        # Here, because Triton is found on machines with a GPU only.
        from scx.kernels.exchange import exchange

        if len(source) > self.max_tokens:
            raise SCXError(
                f"a step of {len(source)} tokens is longer than the {self.max_tokens} "
                "that max_num_batched_tokens announced"
            )
        source = source.contiguous()
        target = torch.empty_like(source)
        exchange(
            source, target, positions, self.mailbox, self.sequence, self.arrivals, hop
        )
        return target


class HostSecureLayer:
    """One encoded layer of a HostDevice; its calls are those of SecureLayer."""

    def __init__(self, host: HostDevice, slot: int) -> None:
        self.device = host.device
        self._host = host
        self._slot = slot

    def encode_rows(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """As SecureLayer.encode_rows; above GROUP_ROWS rows, shuffled within groups."""
        return self._host.exchange(hidden_states, self._hop(ENCODE_ROWS))

    def encode_features(
        self, qkv: torch.Tensor, positions: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """As SecureLayer.encode_features."""
        encoded = self._host.exchange(qkv, self._hop(ENCODE_FEATURES), positions)
        sizes = (self._host.query_size, self._host.kv_size, self._host.kv_size)
        q, k, v = encoded.split(sizes, dim=-1)
        return q, k, v

    def decode_features(self, attention: torch.Tensor, output: torch.Tensor) -> None:
        """As SecureLayer.decode_features."""
        output.copy_(self._host.exchange(attention, self._hop(DECODE_FEATURES)))

    @property
    def features(self) -> FeatureCodec:
        """As SecureLayer.features."""
        return self._host.features[self._slot]

    @property
    def traffic(self) -> Traffic:
        """What crossed so far, replays of captured graphs included. Rows cross while
        others are worked on, so the seconds are those from a hop's call to its end."""
        *counts, nanoseconds = self._host.counters[self._slot].tolist()
        return Traffic(*counts, secure_seconds=nanoseconds / 1e9)

    def _hop(self, kind: int) -> int:
        return 3 * self._slot + kind


def default_workers(ranks: int) -> int:
    """Threads for one of `ranks` ranks of this machine: its cores but a few, shared."""
    cores = len(os.sched_getaffinity(0))
    return max(1, min(MAX_WORKERS, (cores - SPARE_CORES) // ranks))


def _elements(tensor: torch.Tensor):
    """The numpy view that the kernels take: numba has no 16-bit floats."""
    return (
        tensor if tensor.dtype == torch.float32 else tensor.view(torch.uint16)
    ).numpy()


def _stop(flag: torch.Tensor, threads: list[threading.Thread]) -> None:
    flag.fill_(1)
    for thread in threads:
        thread.join()
