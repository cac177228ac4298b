"""The codec in plain torch operations: a secure device on any torch device.

This is the one place where its tensors cross the border, and it counts what crosses.
"""

import contextlib
import time
from collections.abc import Iterator, Sequence
from dataclasses import replace

import torch
from typing_extensions import Self

from scx.codecs import plain, rows
from scx.codecs.interface import FeatureCodec
from scx.devices.interface import Rank, SecureLayer, Traffic, qkv_sizes
from scx.devices.placement import require_apart
from scx.errors import SCXSecureDeviceError


class PlainSecureLayer(SecureLayer):
    """One encoded layer whose calls wait in Python for the secure device."""

    kernels = "torch operations"
    in_graphs = False

    @classmethod
    def build(
        cls,
        features: Sequence[FeatureCodec],
        tables: Sequence[torch.Tensor],
        rank: Rank,
    ) -> list[Self]:
        require_apart(rank.secure_device, rank.accelerator)
        copies = {id(table): table.to(rank.secure_device) for table in tables}
        return [
            cls(
                rank.secure_device,
                layer_features,
                copies[id(table)],
                rank.is_neox_style,
                rank.num_heads,
            )
            for layer_features, table in zip(features, tables, strict=True)
        ]

    def __init__(
        self,
        device: torch.device,
        features: FeatureCodec,
        cos_sin_cache: torch.Tensor,
        is_neox_style: bool,
        num_heads: int,
    ) -> None:
        """`features` are moved to `device`, where `cos_sin_cache` is."""
        self.device = device
        self.features = features.to(device)
        self._busy_since: float | None = None
        self._traffic = Traffic()
        self._seconds = 0.0
        self._received = 0.0
        self._cos_sin_cache = cos_sin_cache
        self._is_neox_style = is_neox_style
        self._split = qkv_sizes(num_heads, features)
        self._pi: torch.Tensor | None = None

    def encode_rows(self, hidden_states: torch.Tensor) -> torch.Tensor:
        with self._busy():
            (hidden_states,), accelerator = self._receive(hidden_states)
            self._traffic.steps += 1
            self._pi = rows.draw_permutation(hidden_states.shape[0], self.device)
            return self._send(accelerator, rows.encode_rows(hidden_states, self._pi))[0]

    def encode_features(
        self, qkv: torch.Tensor, positions: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """As SecureLayer. Raises SCXSecureDeviceError without an `encode_rows` before."""
        pi, self._pi = self._pi, None
        if pi is None:
            raise SCXSecureDeviceError("encode_features without encode_rows before it")
        with self._busy():
            (qkv, positions), accelerator = self._receive(qkv, positions)
            q, k, v = rows.decode_rows(qkv, pi).split(self._split, dim=-1)
            q, k = (
                plain.apply_rotary(
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
        with self._busy():
            (attention,), accelerator = self._receive(attention)
            decoded = self.features.decode_output(attention)
            output.copy_(self._send(accelerator, decoded)[0])

    @property
    def traffic(self) -> Traffic:
        return replace(self._traffic, secure_seconds=self._seconds)

    @property
    def busy_since(self) -> float | None:
        return self._busy_since

    @contextlib.contextmanager
    def _busy(self) -> Iterator[None]:
        self._busy_since = time.monotonic()
        try:
            yield
        finally:
            self._busy_since = None

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
