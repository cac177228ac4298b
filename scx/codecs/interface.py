"""What every codec of features is to the rest of the package."""

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import ClassVar, NoReturn

import torch
from typing_extensions import Self

from scx.keys import RootKey


class FeatureCodec(ABC):
    """One layer's secret and what it does to the features of its heads.

    Heads are (..., heads x D): N query heads or M key/value heads on this rank,
    query head n with the key of key/value head n // (N // M). Results are new
    tensors of the same shape, dtype and device; the device must be the codec's.
    """

    name: ClassVar[str]
    """Its name in `scx.keys.CODECS`."""
    moves_only: ClassVar[bool]
    """Whether it only moves features, so that values survive and none is rounded. Then
    `tables` are int64 (M, D): feature d of an encoded head is its feature key[m, d], and
    the inverse."""
    shifts_scores: ClassVar[bool]
    """Whether all scores of a query change by the same amount. Softmax does not see that,
    but a sink beside the scores would, and so would a cap on them."""
    host_kernels: ClassVar[str] = ""
    """The module of `scx.kernels.host` with its fused kernels; if empty, the
    secure device runs the calls below instead."""
    largest_key_bias: ClassVar[float] = math.inf
    """The key bias above which heads of 16 bits lose more than the codec's class says."""
    kv_heads: int
    """M"""
    head_dim: int
    """D"""

    @classmethod
    @abstractmethod
    def derive(
        cls, root: RootKey, layer: int, kv_heads: Sequence[int], head_dim: int
    ) -> Self:
        """The codec of some heads of a layer, on the CPU.

        `layer` and `kv_heads` are indices in the whole model, not in a rank, so
        that a KV cache is read at another tensor-parallel width or in another
        process that holds the same root key.
        """

    @abstractmethod
    def to(self, device: torch.device) -> Self:
        """The same codec on another device, a secure one."""

    @abstractmethod
    def encode_queries(self, heads: torch.Tensor) -> torch.Tensor:
        """Queries after RoPE, for attention."""

    @abstractmethod
    def encode_keys(self, heads: torch.Tensor) -> torch.Tensor:
        """Keys after RoPE, for attention and its cache."""

    @abstractmethod
    def encode_values(self, heads: torch.Tensor) -> torch.Tensor:
        """Values, for attention and its cache."""

    @abstractmethod
    def decode_output(self, heads: torch.Tensor) -> torch.Tensor:
        """Attention's output for query heads: a weighted mean of values."""

    @abstractmethod
    def decode_keys(self, heads: torch.Tensor) -> torch.Tensor:
        """Undo `encode_keys`."""

    @abstractmethod
    def decode_values(self, heads: torch.Tensor) -> torch.Tensor:
        """Undo `encode_values`."""

    @property
    @abstractmethod
    def tables(self) -> tuple[torch.Tensor, torch.Tensor]:
        """The key as fused kernels take it: to encode with, and to decode the output."""

    def __reduce__(self) -> NoReturn:
        raise TypeError("a codec holds a key, which is neither copied nor pickled")
