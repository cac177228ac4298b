"""The accelerator itself as secure device, as in a GPU with confidential computing.

Nothing leaves the accelerator and nothing waits for the host: the calls are the
kernels of `scx.kernels.cuda.secure`, which any CUDA graph can hold.
"""

import os
from collections.abc import Sequence

import torch
from typing_extensions import Self

from scx.codecs.interface import FeatureCodec
from scx.devices.interface import Rank, SecureLayer, Traffic, qkv_sizes
from scx.errors import SCXSecureDeviceError
from scx.kernels.cuda import secure as kernels


class AcceleratorSecureLayer(SecureLayer):
    """One encoded layer on the accelerator, whose results are contiguous.

    Row orders come from ChaCha20 under a key from the operating system that is the
    layer's own and never leaves it.
    """

    kernels = "Triton kernels of the GPU"
    in_graphs = True
    on_accelerator = True

    @classmethod
    def build(
        cls,
        features: Sequence[FeatureCodec],
        tables: Sequence[torch.Tensor],
        rank: Rank,
    ) -> list[Self]:
        # vLLM's own may be dropped while the model sleeps.
        copies = {id(table): table.clone() for table in tables}
        return [
            cls(layer_features, copies[id(table)], rank.is_neox_style, rank.num_heads)
            for layer_features, table in zip(features, tables, strict=True)
        ]

    def __init__(
        self,
        features: FeatureCodec,
        cos_sin_cache: torch.Tensor,
        is_neox_style: bool,
        num_heads: int,
    ) -> None:
        """`features` are moved to where `cos_sin_cache` (rows, R) is."""
        self.device = cos_sin_cache.device
        self.features = features.to(self.device)
        self._cos_sin_cache = cos_sin_cache
        self._is_neox_style = is_neox_style
        self._num_heads = num_heads
        self._split = qkv_sizes(num_heads, features)
        self._order: torch.Tensor | None = None
        if features.moves_only:
            self._key, self._inverse_key = (
                table.to(torch.int32) for table in self.features.tables
            )
        else:
            # Other codecs map the features afterwards, by torch operations, which a
            # graph holds as well.
            stay = torch.arange(features.head_dim, dtype=torch.int32, device=self.device)
            self._key = stay.repeat(features.kv_heads, 1)
        random_bytes = bytearray(os.urandom(32))
        self._row_key = torch.frombuffer(random_bytes, dtype=torch.int32).to(self.device)
        # Steps and tokens so far. Graphs are replayed without Python, so the device
        # counts; the steps are the nonces of the row orders.
        self._counters = torch.zeros(2, dtype=torch.int64, device=self.device)
        self._single_row = torch.zeros(1, dtype=torch.int64, device=self.device)
        self._row_bytes = 0

    def encode_rows(self, hidden_states: torch.Tensor) -> torch.Tensor:
        hidden_states = hidden_states.contiguous()
        if self._order is not None:
            # The step before was abandoned, but its number must not serve again.
            self._counters[0] += 1
        if len(hidden_states) == 1:
            # It has one order.
            rows, self._order = hidden_states, self._single_row
        else:
            rows, self._order = kernels.encode_rows(
                hidden_states, self._row_key, self._counters
            )
        self._row_bytes = (
            hidden_states.shape[1] + sum(self._split) + self._split[0]
        ) * hidden_states.itemsize
        return rows

    def encode_features(
        self, qkv: torch.Tensor, positions: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """As SecureLayer. Raises SCXSecureDeviceError without an `encode_rows` before."""
        order, self._order = self._order, None
        if order is None:
            raise SCXSecureDeviceError("encode_features without encode_rows before it")
        encoded = kernels.encode_features(
            qkv.contiguous(),
            order,
            positions,
            self._cos_sin_cache,
            self._key,
            self._counters,
            self._num_heads,
            self._is_neox_style,
        )
        q, k, v = encoded.split(self._split, dim=-1)
        features = self.features
        if features.moves_only:
            return q, k, v
        return (
            features.encode_queries(q),
            features.encode_keys(k),
            features.encode_values(v),
        )

    def decode_features(self, attention: torch.Tensor, output: torch.Tensor) -> None:
        if self.features.moves_only:
            kernels.decode_features(attention.contiguous(), self._inverse_key, output)
        else:
            output.copy_(self.features.decode_output(attention))

    @property
    def traffic(self) -> Traffic:
        """What was handed from one side to the other, replayed graphs included."""
        steps, tokens = self._counters.tolist()
        size = tokens * self._row_bytes
        return Traffic(steps, 6 * steps, size + tokens * torch.int64.itemsize, size)
