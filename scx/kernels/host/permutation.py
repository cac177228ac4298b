"""The permutation codec's features on the host's cores.

One pass over memory rotates and permutes features and puts their rows in order. Results
equal the codec's bit for bit.
"""

import functools
from collections.abc import Callable

import numpy as np
import torch
from numba import boolean, float32, int32, int64, intp, uint16, void

from scx.kernels.host.compiled import array, element_of, helper, kernel
from scx.kernels.host.llvm import has_head_function, head_function
from scx.kernels.host.rotary import angles_at, rotate_heads
from scx.kernels.host.rows import prefetch_row

# A layer's key (M, D): which feature of its head each feature comes from.
_KEY = array(uint16, 2)


def pack(key: torch.Tensor) -> np.ndarray:
    """A key as the kernels take it: int64 (..., M, D) becomes uint16."""
    return key.to(torch.uint16).contiguous().numpy()


@functools.cache
def encode_features_kernel(dtype: torch.dtype) -> Callable:
    rows, rank, positions = array(element_of(dtype), 2), array(int32, 1), array(int64, 1)
    cos_sin = array(float32, 2)
    permute_heads, turn_heads = _permute_heads(dtype), _turn_heads(dtype)

    @kernel(void(rows, rows, rank, positions, cos_sin, _KEY, intp, boolean, intp, intp))
    def encode_features(
        src, dst, rank, positions, cos_sin, key, num_heads, is_neox_style, first, last
    ):
        """Rotate and permute the features of rows that `encode_rows` has shuffled.

        Row j of `dst` comes from row rank[j] of `src`; `rank` (T,) is the inverse of
        the shuffle. Both are (T, (N + 2M) x D): queries, keys, values. Queries and
        keys are rotated to positions[j] by `cos_sin` (max_position, R): cosines, then
        sines. Feature d of a head is then its rotated feature key[m, d].
        """
        kv_heads, head_dim = key.shape
        queries = num_heads * head_dim
        turning = queries + kv_heads * head_dim
        rotated = np.empty(queries, src.dtype)
        for j in range(first, last):
            if j + 1 < last:
                prefetch_row(src[rank[j + 1]])
            row, encoded = src[rank[j]], dst[j]
            angles = angles_at(cos_sin, positions, j)
            turn_heads(
                row[:queries], encoded[:queries], key, angles, is_neox_style, rotated
            )
            turn_heads(
                row[queries:turning],
                encoded[queries:turning],
                key,
                angles,
                is_neox_style,
                rotated,
            )
            permute_heads(row[turning:], encoded[turning:], key)

    return encode_features


@functools.cache
def decode_features_kernel(dtype: torch.dtype) -> Callable:
    rows, permute_heads = array(element_of(dtype), 2), _permute_heads(dtype)

    @kernel(void(rows, rows, _KEY, intp, intp))
    def decode_features(src, dst, inverse_key, first, last):
        """Feature d of a head in `dst` becomes its feature inverse_key[m, d] in `src`.

        Both are (T, N x D).
        """
        for j in range(first, last):
            permute_heads(src[j], dst[j], inverse_key)

    return decode_features


def _in_registers(dtype: torch.dtype) -> bool:
    """Whether heads of 64 or 128 features are held in AVX-512 registers."""
    return dtype != torch.float32 and has_head_function()


@functools.cache
def _heads_in_registers(head_dim: int, rotated: torch.dtype | None) -> Callable:
    one_head = head_function(head_dim, rotated)

    @helper
    def heads_in_registers(src, dst, key, cos_sin):
        """`head_function` for every head of one row."""
        kv_heads = key.shape[0]
        group, size = dst.size // key.size, 2 * head_dim
        source, target = src.ctypes.data, dst.ctypes.data
        for m in range(kv_heads):
            entry = key.ctypes.data + m * size
            for start in range(m * group * size, (m + 1) * group * size, size):
                one_head(source + start, target + start, entry, cos_sin)

    return heads_in_registers


@functools.cache
def _permute_heads(dtype: torch.dtype) -> Callable:
    @helper
    def permute_head(src, dst, key):
        for d in range(np.uintp(key.size)):
            dst[d] = src[np.uintp(key[d])]

    @helper
    def permute_heads(src, dst, key):
        """Permute one row's queries, keys or values: (heads x D)."""
        kv_heads, head_dim = key.shape
        group_columns = src.size // kv_heads
        for m in range(kv_heads):
            for start in range(m * group_columns, (m + 1) * group_columns, head_dim):
                end = start + head_dim
                permute_head(src[start:end], dst[start:end], key[m])

    if not _in_registers(dtype):
        return permute_heads
    permute_64 = _heads_in_registers(64, None)
    permute_128 = _heads_in_registers(128, None)

    @helper
    def permute_heads_avx512(src, dst, key):
        if key.shape[1] == 64:
            permute_64(src, dst, key, 0)
        elif key.shape[1] == 128:
            permute_128(src, dst, key, 0)
        else:
            permute_heads(src, dst, key)

    return permute_heads_avx512


@functools.cache
def _turn_heads(dtype: torch.dtype) -> Callable:
    permute_heads, rotate = _permute_heads(dtype), rotate_heads(dtype)

    @helper
    def turn_heads(src, dst, key, cos_sin, is_neox_style, rotated):
        """Rotate one row's queries or keys by one position's angles, and permute them.

        `rotated` is scratch memory of at least their size.
        """
        rotate(src, rotated[: src.size], cos_sin, key.shape[1], is_neox_style)
        permute_heads(rotated[: src.size], dst, key)

    if not _in_registers(dtype):
        return turn_heads
    turn_64 = _heads_in_registers(64, dtype)
    turn_128 = _heads_in_registers(128, dtype)

    @helper
    def turn_heads_avx512(src, dst, key, cos_sin, is_neox_style, rotated):
        all_turn = is_neox_style and cos_sin.size == key.shape[1]
        if all_turn and key.shape[1] == 64:
            turn_64(src, dst, key, cos_sin.ctypes.data)
        elif all_turn and key.shape[1] == 128:
            turn_128(src, dst, key, cos_sin.ctypes.data)
        else:
            turn_heads(src, dst, key, cos_sin, is_neox_style, rotated)

    return turn_heads_avx512
