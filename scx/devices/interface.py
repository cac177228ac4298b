"""The border between the accelerator and a secure device: what every device answers."""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, NoReturn

import torch

from scx.codecs.interface import FeatureCodec


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
    """Time that the secure device worked, in seconds, including transfers that overlap
    the work and no others; None if not measured. Asynchronous work counts only the time
    to enqueue it."""


@dataclass(frozen=True, kw_only=True)
class Rank:
    """What the encoded layers of one rank have in common."""

    num_heads: int
    """N, query heads of this rank."""
    hidden_size: int
    """H, columns of hidden_states."""
    dtype: torch.dtype
    """Of hidden_states, qkv and attention."""
    max_tokens: int
    """The most rows of a step, padding included."""
    is_neox_style: bool
    """Which features RoPE pairs, as in `scx.codecs.plain.apply_rotary`."""
    accelerator: torch.device
    """Where the model runs."""
    secure_device: torch.device
    """The device that SCX_SECURE_DEVICE names."""
    workers: int
    """Threads that the host may use, if it is the secure device."""


class SecureLayer(ABC):
    """The secure device's part in one encoded layer: three calls per step, in order.

    It holds the layer's codec of features and, between the first two calls, the row
    permutation of the step. Neither is ever in an nn.Module or in a traced function, nor
    on the accelerator, unless that is the secure device itself.

    Letters: T tokens of the step, H columns of hidden_states, N query heads and M
    key/value heads of D features on this rank.
    """

    kernels: ClassVar[str]
    """What runs the calls, for people."""
    in_graphs: ClassVar[bool]
    """Whether a CUDA graph can hold the calls: none of them waits for Python."""
    on_accelerator: ClassVar[bool] = False
    """Whether the accelerator is the device itself. Then no other device can fail to
    answer, and its own counters cannot be read without waiting for it."""

    device: torch.device
    """Where the calls run."""
    features: FeatureCodec
    """The layer's codec, on `device`."""

    @classmethod
    @abstractmethod
    def build(
        cls,
        features: Sequence[FeatureCodec],
        tables: Sequence[torch.Tensor],
        rank: Rank,
    ) -> Sequence["SecureLayer"]:
        """A layer for each codec in `features`.

        `tables` has each layer's rotary table (rows, R), on the accelerator: cosines,
        then sines, of each position. R is the same for all. Layers that share one name
        the same tensor, of which the device keeps one copy. Raises SCXUnsupportedError if
        the device cannot serve such layers.
        """

    @abstractmethod
    def encode_rows(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """The rows of `hidden_states` (T, H) in an order that nobody else knows.

        Both are on the accelerator. Each call draws a fresh permutation. A single row has
        only one, and may be returned as it is.
        """

    @abstractmethod
    def encode_features(
        self, qkv: torch.Tensor, positions: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Encoded q (T, N x D), k and v (T, M x D) from the shuffled rows of `qkv`.

        `qkv` (T, (N + 2M) x D) is in the order of the last `encode_rows`, `positions`
        int64 (T,) in that of the batch; all are on the accelerator. An order serves one
        step: a call without `encode_rows` before it fails.
        """

    @abstractmethod
    def decode_features(self, attention: torch.Tensor, output: torch.Tensor) -> None:
        """Write the decoded features of `attention` (T, N x D) to `output`.

        Both are on the accelerator, `output` is contiguous and overlaps nothing.
        """

    @property
    @abstractmethod
    def traffic(self) -> Traffic:
        """What crossed so far."""

    @property
    def busy_since(self) -> float | None:
        """When the call in progress began, by time.monotonic; None between calls.

        Another thread may read it, and `failure`, at any time.
        """
        return None

    @property
    def failure(self) -> str | None:
        """Why the device answers no more, or None. A call that fails raises its error."""
        return None

    def __reduce__(self) -> NoReturn:
        raise TypeError("a secure device and its keys are neither copied nor pickled")


def qkv_sizes(num_heads: int, features: FeatureCodec) -> list[int]:
    """Columns of q, k and v in a row of qkv."""
    kv_size = features.kv_heads * features.head_dim
    return [num_heads * features.head_dim, kv_size, kv_size]
