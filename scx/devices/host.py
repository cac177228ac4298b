"""The host as secure device, without a wait in Python.

The accelerator runs `scx.kernels.cuda.exchange`, worker threads of this process run
`scx.kernels.host.worker`, and between them lies pinned memory that is allocated
once. So a step stays asynchronous for vLLM, can be captured in a CUDA graph,
and draws a fresh row permutation in each replay.
"""

import logging
import threading
import time
import weakref
from collections.abc import Collection, Sequence

import numba
import numpy as np
import torch
from typing_extensions import Self

from scx.codecs.interface import FeatureCodec
from scx.devices.interface import Rank, SecureLayer, Traffic, qkv_sizes
from scx.devices.numa import cores_near, running_on
from scx.errors import SCXSecureDeviceError
from scx.kernels.host import worker as host_worker
from scx.kernels.host.memory import (
    BAD_REQUEST,
    BUSY_HOP,
    BUSY_SINCE,
    CONTROL_WORDS,
    CUT_OFF,
    DECODE_FEATURES,
    DIED,
    ENCODE_FEATURES,
    ENCODE_ROWS,
    HOP_LAYER,
    NO_RANDOMNESS,
    OK,
    STATUS,
    STOP,
    Private,
    Shared,
)
from scx.kernels.host.table import host_kernels
from scx.kernels.host.waiting import new_semaphores, wake_all
from scx.kernels.mailbox import Mailbox
from scx.kernels.protocol import (
    FLAG_STRIDE,
    FORSAKEN,
    progress_words,
    require_within_limits,
)

CLOSING_SECONDS = 10.0
"""How long closing a HostDevice waits for its workers at most."""
PATIENCE_NAPS = 100_000
"""Naps of a worker, 50 us and the kernel's slack each, before it gives up a trip: about
10 seconds. A kernel that began a trip sends all its rows within milliseconds. No clock
is read, as the time for which a machine was suspended must not count."""

_FAILURES = {
    NO_RANDOMNESS: "the operating system gave no randomness (getrandom) to draw a row "
    "order with",
    CUT_OFF: "rows that the accelerator announced did not come: its kernel was cut off, "
    "as by another CUDA error",
    BAD_REQUEST: "the accelerator asked for a trip that no step makes",
    DIED: "a worker ended by an exception, which is in the log",
}

# vLLM's logger of the same name, whose handlers and levels apply.
_logger = logging.getLogger("vllm.scx")


class _Workers:
    """The threads that serve a mailbox, and what became of them."""

    failure: str | None = None
    """Why they serve no more, or None while they do."""

    def __init__(
        self,
        dtype: torch.dtype,
        kernels: str,
        shared: Shared,
        own: Private,
        cores: Collection[int],
    ) -> None:
        """Compiles their loop and starts as many as `own.served` has rows for, on
        `cores`."""
        self._cores = cores
        self._shared, self._own = shared, own
        self._serve = host_worker.worker_loop(dtype, kernels)
        self._serve.compile(tuple(map(numba.typeof, (0, shared, own))))
        self.threads = [
            threading.Thread(
                target=self._run, args=(i,), name=f"scx-host-{i}", daemon=True
            )
            for i in range(len(own.served))
        ]
        for thread in self.threads:
            thread.start()

    def _run(self, worker: int) -> None:
        status = DIED
        try:
            with running_on(self._cores):
                status = self._serve(worker, self._shared, self._own)
        finally:
            if status == DIED:
                # What the loop does before it returns. The threading module reports the
                # exception itself.
                self._own.control[STATUS] = DIED
                self._shared.done[::FLAG_STRIDE] = FORSAKEN
                wake_all(self._own)
            if status != OK:
                self.failure = _FAILURES[status]
                _logger.error("SCX: the secure device cpu has ended: %s", self.failure)

    def busy_since(self, slot: int) -> float | None:
        """When the trip of a layer that is being served began, by time.monotonic."""
        control, hops = self._own.control, self._own.hops
        started = int(control[BUSY_SINCE])
        here = hops[control[BUSY_HOP], HOP_LAYER] == slot
        return started / 1e9 if started and here else None

    def close(self) -> None:
        """Have them end, and wait for that as long as CLOSING_SECONDS."""
        self.failure = self.failure or "it was closed"
        self._own.control[STOP] = 1
        wake_all(self._own)
        end = time.monotonic() + CLOSING_SECONDS
        for thread in self.threads:
            thread.join(max(0.0, end - time.monotonic()))


class HostDevice:
    """The secure memory and the workers of one rank, shared by its encoded layers."""

    def __init__(
        self,
        features: Sequence[FeatureCodec],
        tables: Sequence[torch.Tensor],
        rank: Rank,
    ) -> None:
        """One codec of features and one rotary table for each encoded layer, in the order
        of their slots.

        Compiles the workers' loop, which takes seconds, and starts `rank.workers` of
        them. Raises SCXUnsupportedError if a step or a model is too large for the
        protocol.
        """
        self.split = qkv_sizes(rank.num_heads, features[0])
        widths = {
            ENCODE_ROWS: rank.hidden_size,
            ENCODE_FEATURES: sum(self.split),
            DECODE_FEATURES: self.split[0],
        }
        slots = range(len(features))
        hops = [[kind, slot, widths[kind]] for slot in slots for kind in range(3)]
        require_within_limits(rank.max_tokens, len(hops))
        self.device = torch.device("cpu")
        self.max_tokens = rank.max_tokens
        self.features = [each.to(self.device) for each in features]
        cores = cores_near(rank.accelerator)
        with running_on(cores):
            self.mailbox = Mailbox.allocate(
                rank.max_tokens, max(widths.values()), rank.dtype
            )
        self.sequence = torch.zeros(1, dtype=torch.int64, device=rank.accelerator)
        self.progress = torch.zeros(
            progress_words(rank.max_tokens), dtype=torch.int32, device=rank.accelerator
        )
        self.counters = np.zeros((len(slots), 5), np.int64)

        kernels = features[0].host_kernels
        pack = host_kernels(rank.dtype, kernels).pack
        keys = zip(*(each.tables for each in self.features), strict=True)
        encoding_keys, decoding_keys = (pack(torch.stack(layers)) for layers in keys)
        cos_sin, rotary_rows = _joined(tables)
        shared = {name: _array(words) for name, words in vars(self.mailbox).items()}
        own = Private(
            control=np.zeros(CONTROL_WORDS, np.int64),
            served=np.zeros((rank.workers, FLAG_STRIDE), np.int64),
            asleep=np.zeros((rank.workers, FLAG_STRIDE), np.int64),
            semaphores=new_semaphores(rank.workers),
            trip=np.zeros(4, np.int64),
            hops=np.array(hops, np.int64),
            orders=np.zeros((len(slots), 2), np.int64),
            words=np.zeros((len(slots), rank.max_tokens), np.uint64),
            encoding_keys=encoding_keys,
            decoding_keys=decoding_keys,
            cos_sin=cos_sin,
            rotary_rows=rotary_rows,
            counters=self.counters,
            num_heads=rank.num_heads,
            is_neox_style=rank.is_neox_style,
            patience=PATIENCE_NAPS,
        )
        self.workers = _Workers(rank.dtype, kernels, Shared(**shared), own, cores)
        # Also at the end of the interpreter. The threads hold nothing of this object.
        self._finalizer = weakref.finalize(self, self.workers.close)

    def close(self) -> None:
        """Stop the workers, within CLOSING_SECONDS. Later trips are refused, and one that
        is on its way ends with a CUDA error."""
        self._finalizer()

    def exchange(
        self,
        source: torch.Tensor,
        hop: int,
        target: torch.Tensor | None = None,
        positions: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """What the host makes of the rows of `source` (T, W) in this hop: `target`
        (T, W), which is contiguous, or a new tensor.

        Raises SCXSecureDeviceError for more rows than the staging memory holds, and if
        the workers have ended.
        """
        # Here, because Triton is found on machines with a GPU only.
        from scx.kernels.cuda.exchange import exchange

        if failure := self.workers.failure:
            raise SCXSecureDeviceError(f"the secure device cpu has ended: {failure}")
        if len(source) > self.max_tokens:
            raise SCXSecureDeviceError(
                f"a step of {len(source)} tokens is longer than the {self.max_tokens} "
                "that max_num_batched_tokens announced"
            )
        source = source.contiguous()
        if target is None:
            target = torch.empty_like(source)
        exchange(
            source, target, positions, self.mailbox, self.sequence, self.progress, hop
        )
        return target


class HostSecureLayer(SecureLayer):
    """One encoded layer of a HostDevice."""

    kernels = "threads of the host"
    in_graphs = True

    @classmethod
    def build(
        cls,
        features: Sequence[FeatureCodec],
        tables: Sequence[torch.Tensor],
        rank: Rank,
    ) -> list[Self]:
        host = HostDevice(features, tables, rank)
        _logger.info(
            "SCX host device: %d workers, %.1f MiB pinned",
            len(host.workers.threads),
            host.mailbox.nbytes / 2**20,
        )
        return [cls(host, slot) for slot in range(len(features))]

    def __init__(self, host: HostDevice, slot: int) -> None:
        self.device = host.device
        self.features = host.features[slot]
        self._host = host
        self._slot = slot

    def encode_rows(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """As SecureLayer. More than GROUP_ROWS rows are shuffled within groups, and a
        single row, which has one order, stays where it is."""
        if len(hidden_states) == 1:
            return hidden_states
        return self._host.exchange(hidden_states, self._hop(ENCODE_ROWS))

    def encode_features(
        self, qkv: torch.Tensor, positions: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        hop = self._hop(ENCODE_FEATURES)
        encoded = self._host.exchange(qkv, hop, positions=positions)
        q, k, v = encoded.split(self._host.split, dim=-1)
        return q, k, v

    def decode_features(self, attention: torch.Tensor, output: torch.Tensor) -> None:
        self._host.exchange(attention, self._hop(DECODE_FEATURES), target=output)

    @property
    def busy_since(self) -> float | None:
        return self._host.workers.busy_since(self._slot)

    @property
    def failure(self) -> str | None:
        return self._host.workers.failure

    @property
    def traffic(self) -> Traffic:
        """What crossed so far, replays of captured graphs included. Rows cross while
        others are worked on, so the seconds are those from a hop's call to its end."""
        *counts, nanoseconds = self._host.counters[self._slot].tolist()
        return Traffic(*counts, secure_seconds=nanoseconds / 1e9)

    def _hop(self, kind: int) -> int:
        return 3 * self._slot + kind


def _joined(tables: Sequence[torch.Tensor]) -> tuple[np.ndarray, np.ndarray]:
    """Each different one of `tables` once, in one array, float32 (rows, R), and which of
    its rows, first and behind the last, are those of each layer: int64 (layers, 2)."""
    different = {id(table): table for table in tables}
    ends = np.cumsum([len(table) for table in different.values()])
    bounds = {
        key: (end - len(table), end)
        for (key, table), end in zip(different.items(), ends, strict=True)
    }
    cos_sin = torch.cat([table.to("cpu", torch.float32) for table in different.values()])
    return cos_sin.numpy(), np.array([bounds[id(table)] for table in tables], np.int64)


def _array(tensor: torch.Tensor) -> np.ndarray:
    """The numpy view that the kernels take: numba has no 16-bit floats."""
    halves = tensor.is_floating_point() and tensor.itemsize == 2
    return (tensor.view(torch.uint16) if halves else tensor).numpy()
