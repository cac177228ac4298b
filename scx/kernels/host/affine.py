"""The affine codec of features on the cores of the host.

Some rows at a time are put in their order, rotated and rounded as the codec does
it; then all their heads that share a map are multiplied by it together. Sums are
float32, in another order than torch's, so results are the codec's up to rounding.
"""

import functools
from collections.abc import Callable

import numpy as np
import torch

from scx.kernels.host import llvm
from scx.kernels.host.compiled import element_of, helper, kernel
from scx.kernels.host.rotary import angles_at, rotate_heads
from scx.kernels.host.rows import prefetch_row

KEY = "float32[:, :, :, ::1]"
"""numba's type of a layer's maps: (maps, column blocks, D + 1, lanes)."""

_ROWS = 8
"""Rows at a time: a map is read from the cache once for all of them."""


def pack(maps: torch.Tensor) -> np.ndarray:
    """`maps` float32 (..., maps, D + 1, D), an offset below each, as the kernels take it.

    Columns are padded to whole blocks, which then lie one after another.
    """
    lanes = llvm.lanes()
    padded = torch.nn.functional.pad(maps, (0, -maps.shape[-1] % lanes))
    blocks = padded.unflatten(-1, (-1, lanes)).transpose(-2, -3)
    return blocks.contiguous().numpy()


@functools.cache
def encode_features_kernel(dtype: torch.dtype) -> Callable:
    element = element_of(dtype)
    rotate, map_heads = rotate_heads(dtype), _map_heads(dtype)

    @kernel(
        f"void({element}[:, ::1], {element}[:, ::1], int32[::1], int64[::1], "
        f"float32[:, ::1], {KEY}, intp, boolean, intp, intp)"
    )
    def encode_features(
        src, dst, rank, positions, cos_sin, maps, num_heads, is_neox_style, first, last
    ):
        """As that of `scx.kernels.host.permutation`, but for the key: 3M maps, packed, of
        queries, keys and values."""
        kv_heads, head_dim = maps.shape[0] // 3, maps.shape[2] - 1
        queries = num_heads * head_dim
        turning = queries + kv_heads * head_dim
        ordered = np.empty((_ROWS, src.shape[1]), src.dtype)
        for begin in range(first, last, _ROWS):
            end = min(begin + _ROWS, last)
            for j in range(begin, end):
                if j + 1 < last:
                    prefetch_row(src[rank[j + 1]])
                row, turned = src[rank[j]], ordered[j - begin]
                angles = angles_at(cos_sin, positions, j)
                rotate(row[:turning], turned[:turning], angles, head_dim, is_neox_style)
                turned[turning:] = row[turning:]
            rows, encoded = ordered[: end - begin], dst[begin:end]
            map_heads(rows, encoded, 0, queries, maps[:kv_heads])
            map_heads(rows, encoded, queries, turning, maps[kv_heads : 2 * kv_heads])
            map_heads(rows, encoded, turning, dst.shape[1], maps[2 * kv_heads :])

    return encode_features


@functools.cache
def decode_features_kernel(dtype: torch.dtype) -> Callable:
    element = element_of(dtype)
    map_heads = _map_heads(dtype)

    @kernel(f"void({element}[:, ::1], {element}[:, ::1], {KEY}, intp, intp)")
    def decode_features(src, dst, maps, first, last):
        """As that of `scx.kernels.host.permutation`, but for the key: M maps, packed."""
        for begin in range(first, last, _ROWS):
            end = min(begin + _ROWS, last)
            map_heads(src[begin:end], dst[begin:end], 0, dst.shape[1], maps)

    return decode_features


@functools.cache
def _map_heads(dtype: torch.dtype) -> Callable:
    widen, narrow = llvm.converters(dtype)
    multiply = llvm.panel_function(llvm.lanes())
    vectors = llvm.VECTORS

    @helper
    def map_heads(src, dst, first, last, maps):
        """Map the heads in columns [first, last) of a few rows: M groups, a map each."""
        kv_heads, blocks, rows_of_map, lanes = maps.shape
        head_dim, width = rows_of_map - 1, blocks * lanes
        group = (last - first) // (kv_heads * head_dim)
        count = len(src) * group
        # Vectors beyond the last are multiplied too, and left where they are.
        room = (count + vectors - 1) // vectors * vectors
        heads = np.zeros((room, head_dim), np.float32)
        mapped = np.empty((room, width), np.float32)
        for m in range(kv_heads):
            start = first + m * group * head_dim
            for n in range(count):
                column = start + n % group * head_dim
                head, vector = src[n // group, column : column + head_dim], heads[n]
                for d in range(np.uintp(head_dim)):
                    vector[d] = widen(head[d])
            for block in range(blocks):
                matrix = maps[m, block].ctypes.data
                for n in range(0, count, vectors):
                    multiply(
                        heads[n].ctypes.data,
                        matrix,
                        mapped[n].ctypes.data + 4 * lanes * block,
                        head_dim,
                        width,
                    )
            for n in range(count):
                column = start + n % group * head_dim
                head, vector = dst[n // group, column : column + head_dim], mapped[n]
                for d in range(np.uintp(head_dim)):
                    head[d] = narrow(vector[d])

    return map_heads
