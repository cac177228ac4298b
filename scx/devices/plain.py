"""The border between the accelerator and the secure device.

This is the one place where tensors cross, and it counts what crosses. It runs
the codec in plain torch operations on any torch device.
"""

import contextlib
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, NoReturn, Protocol

import torch

from scx.codecs import reference as codec
from scx.codecs.interface import FeatureCodec
from scx.errors import SCXSecureDeviceError


@dataclass
class Traffic:
    """What has crossed the border for one encoded layer."""

    steps: int = 0
    """Forward passes, profiling and warm-up included."""
    crossings: int = 0
    """Times that execution passed from one device to the other."""
    bytes_in: int = 0
    """Bytes that the secure device received."""
    bytes_out: int = 0
    """Bytes that the accelerator received."""
    secure_seconds: float | None = None
    """Seconds that the secure device worked, with transfers that run beside its work
    and without others; None where nobody measures that. What it only queues counts as
    the time to queue it."""


class WatchedLayer(Protocol):
    """What can be seen of an encoded layer's secure device, from another thread."""

    device: torch.device

    @property
    def busy_since(self) -> float | None:
        """When the call that runs began, by time.monotonic; None between calls."""

    @property
    def failure(self) -> str | None:
        """Why the device answers no more, or None."""


class SecureLayer:
    """The secure device's part in one encoded layer: three calls a step, in order.

    It holds the layer's codec of features and, between the first two calls, the row
    permutation of the step. Neither is ever on the accelerator, in an nn.Module
    or in a traced function.
    """

    busy_since: float | None = None
    """As WatchedLayer.busy_since."""
    failure: str | None = None
    """As WatchedLayer.failure. Here a call that fails raises its error."""
    norms: Sequence[Any] = ()
    """The modules RMSNorm of queries and of keys, of the models that have them. Their
    weights are public and load after the model is built, so each step reads them."""

    def __init__(
        self,
        device: torch.device,
        features: FeatureCodec,
        cos_sin_cache: torch.Tensor,
        is_neox_style: bool,
        num_heads: int,
    ) -> None:
        """`features` and `cos_sin_cache` (max_position, R) are moved to `device`; a
        cache that is there already is shared, not copied.
        """
        self.device = device
        self._traffic = Traffic()
        self._seconds = 0.0
        self._received = 0.0
        self.features = features.to(device)
        self._cos_sin_cache = cos_sin_cache.to(device)
        self._is_neox_style = is_neox_style
        kv_size = features.kv_heads * features.head_dim
        self._split = [num_heads * features.head_dim, kv_size, kv_size]
        self._pi: torch.Tensor | None = None

    def encode_rows(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """The rows of `hidden_states` (T, H) in an order that nobody else knows.

        Both are on the accelerator. Each call draws a fresh permutation.
        """
        with self._busy():
            (hidden_states,), accelerator = self._receive(hidden_states)
            self._traffic.steps += 1
            self._pi = codec.draw_permutation(hidden_states.shape[0], self.device)
            rows = codec.embeddings_pi_left(hidden_states, self._pi)
            return self._send(accelerator, rows)[0]

    def encode_features(
        self, qkv: torch.Tensor, positions: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Encoded q (T, N x D), k and v (T, M x D) from the shuffled rows of `qkv`.

        `qkv` (T, (N + 2M) x D) is in the order of the last `encode_rows`,
        `positions` (T,) in that of the batch; all are on the accelerator. Raises
        SCXSecureDeviceError without an `encode_rows` before: an order serves one step.
        """
        pi = self._take_order()
        with self._busy():
            weights = [norm.weight for norm in self.norms]
            (qkv, positions, *weights), accelerator = self._receive(
                qkv, positions, *weights
            )
            q, k, v = codec.decode_rows(qkv, pi).split(self._split, dim=-1)
            if self.norms:
                q, k = (
                    codec.rms_norm(heads, weight, norm.variance_epsilon)
                    for heads, weight, norm in zip(
                        (q, k), weights, self.norms, strict=True
                    )
                )
            q, k = (
                codec.apply_rotary(
                    heads,
                    positions,
                    self._cos_sin_cache,
                    self.features.head_dim,
                    self._is_neox_style,
                )
                for heads in (q, k)
            )
            q, k, v = self._send(
                accelerator,
                self.features.encode_queries(q),
                self.features.encode_keys(k),
                self.features.encode_values(v),
            )
            return q, k, v

    def decode_features(self, attention: torch.Tensor, output: torch.Tensor) -> None:
        """Write the decoded features of `attention` (T, N x D) to `output`.

        Both are on the accelerator.
        """
        with self._busy():
            (attention,), accelerator = self._receive(attention)
            decoded = self.features.decode_output(attention)
            output.copy_(self._send(accelerator, decoded)[0])

    @property
    def traffic(self) -> Traffic:
        """What crossed so far."""
        return replace(self._traffic, secure_seconds=self._seconds)

    def __reduce__(self) -> NoReturn:
        raise TypeError("a secure device and its keys are neither copied nor pickled")

    def _take_order(self) -> torch.Tensor:
        """The order of the rows that were sent last, for the one time that it serves."""
        pi, self._pi = self._pi, None
        if pi is None:
            raise SCXSecureDeviceError("encode_features without encode_rows before it")
        return pi

    @contextlib.contextmanager
    def _busy(self) -> Iterator[None]:
        self.busy_since = time.monotonic()
        try:
            yield
        finally:
            self.busy_since = None

    def _receive(self, *tensors: torch.Tensor) -> tuple[list[torch.Tensor], torch.device]:
        self._traffic.crossings += 1
        self._traffic.bytes_in += sum(tensor.nbytes for tensor in tensors)
        received = [tensor.to(self.device) for tensor in tensors]
        self._received = time.monotonic()
        return received, tensors[0].device

    def _send(
        self, accelerator: torch.device, *tensors: torch.Tensor
    ) -> list[torch.Tensor]:
        self._seconds += time.monotonic() - self._received
        self._traffic.crossings += 1
        self._traffic.bytes_out += sum(tensor.nbytes for tensor in tensors)
        return [tensor.to(accelerator) for tensor in tensors]
