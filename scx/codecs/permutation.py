"""The codec of SCX: a secret permutation of each head's features.

Why it leaves attention as it is: for a permutation P of a head's features
(qP)(kP)^T = q k^T, so scores and softmax do not change, and softmax(s)(vP) =
(softmax(s) v)P, which P^-1 undoes. The scheme is that of SCX (SIGCOMM 2025,
doi 10.1145/3718958.3750509).

The functions, in torch alone, are the specification that the fused kernels of
`scx.kernels` are tested against. Results are new tensors on the device of the
first argument.

Letters: T tokens of the step, N query heads, M key/value heads of D features
on this rank; query head n belongs to key/value head n // (N // M).
"""

from collections.abc import Sequence

import torch
from typing_extensions import Self

from scx.codecs.interface import FeatureCodec
from scx.codecs.rows import WORD_BYTES, permutation_from
from scx.keys import RootKey


class PermutationCodec(FeatureCodec):
    """`encode_features` and its inverse, with one key for q, k and v.

    Exact in every type: features move, and none is rounded.
    """

    name = "permutation"
    moves_only = True
    shifts_scores = False
    host_kernels = "permutation"

    def __init__(self, key: torch.Tensor) -> None:
        """`key` is int64 (M, D)."""
        self.key = key
        self.kv_heads, self.head_dim = key.shape

    @classmethod
    def derive(
        cls, root: RootKey, layer: int, kv_heads: Sequence[int], head_dim: int
    ) -> Self:
        return cls(derive_feature_key(root, layer, kv_heads, head_dim))

    def to(self, device: torch.device) -> Self:
        return type(self)(self.key.to(device))

    def encode_queries(self, heads: torch.Tensor) -> torch.Tensor:
        return encode_features(heads, self.key)

    encode_keys = encode_values = encode_queries

    def decode_output(self, heads: torch.Tensor) -> torch.Tensor:
        return decode_features(heads, self.key)

    decode_keys = decode_values = decode_output

    @property
    def tables(self) -> tuple[torch.Tensor, torch.Tensor]:
        """The key and its inverse, int64 (M, D)."""
        return self.key, self.key.argsort(-1)


def derive_feature_key(
    root: RootKey, layer: int, kv_heads: Sequence[int], head_dim: int
) -> torch.Tensor:
    """The feature permutations of a layer's key/value heads: int64 (M, D), on the CPU.

    `layer` and `kv_heads` are indices in the whole model, not in a rank, so
    that a KV cache is read at another tensor-parallel width or in another
    process that holds the same root key.
    """
    size = head_dim * WORD_BYTES
    words = [root.derive("features", layer, head, length=size) for head in kv_heads]
    return torch.stack([permutation_from(word) for word in words])


def encode_features(heads: torch.Tensor, key: torch.Tensor) -> torch.Tensor:
    """Permute the features of heads (T, heads x D) under `key` (M, D).

    Feature d of a head's result is its feature key[m, d], where m is the
    key/value head that the head belongs to: queries and keys or values take
    the same call.
    """
    return _gather_features(heads, key)


def decode_features(heads: torch.Tensor, key: torch.Tensor) -> torch.Tensor:
    """Undo `encode_features` with the same `key`."""
    return _gather_features(heads, key.argsort(dim=-1))


def _gather_features(heads: torch.Tensor, key: torch.Tensor) -> torch.Tensor:
    kv_heads, head_dim = key.shape
    columns_per_kv_head = heads.shape[-1] // kv_heads
    base = torch.arange(0, columns_per_kv_head, head_dim, device=key.device)
    first = torch.arange(0, heads.shape[-1], columns_per_kv_head, device=key.device)
    columns = first[:, None, None] + base[:, None] + key[:, None, :]
    return heads.index_select(-1, columns.flatten())
