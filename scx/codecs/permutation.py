"""The codec of SCX: a secret permutation of each head's features."""

from collections.abc import Sequence

import torch
from typing_extensions import Self

from scx.codecs import reference as codec
from scx.codecs.interface import FeatureCodec
from scx.keys import RootKey


class PermutationCodec(FeatureCodec):
    """`reference.encode_features` and its inverse, with one key for q, k and v.

    Exact in every type: features move, and none is rounded.
    """

    name = "permutation"

    def __init__(self, key: torch.Tensor) -> None:
        """`key` is int64 (M, D)."""
        self.key = key
        self.kv_heads, self.head_dim = key.shape

    @classmethod
    def derive(
        cls, root: RootKey, layer: int, kv_heads: Sequence[int], head_dim: int
    ) -> Self:
        return cls(codec.derive_feature_key(root, layer, kv_heads, head_dim))

    def to(self, device: torch.device) -> Self:
        return type(self)(self.key.to(device))

    def encode_queries(self, heads: torch.Tensor) -> torch.Tensor:
        return codec.encode_features(heads, self.key)

    encode_keys = encode_values = encode_queries

    def decode_output(self, heads: torch.Tensor) -> torch.Tensor:
        return codec.decode_features(heads, self.key)

    decode_keys = decode_values = decode_output

    @property
    def tables(self) -> tuple[torch.Tensor, torch.Tensor]:
        """The key and its inverse, int64 (M, D)."""
        return self.key, self.key.argsort(-1)
