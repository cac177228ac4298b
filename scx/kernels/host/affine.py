"""The affine codec's features on the host's cores.

A few rows at a time are put in order, rotated, and rounded as the codec rounds them.
Then all their heads that share a map are multiplied by it together. Sums are float32
but not in torch's order, so results equal the codec's up to rounding.
"""

import functools
from collections.abc import Callable

import numpy as np
import torch
from numba import boolean, float32, int32, int64, intp, void

from scx.kernels.host.compiled import array, element_of, helper, kernel
from scx.kernels.host.llvm import VECTORS, conversions, panel_function, panel_lanes
from scx.kernels.host.rotary import angles_at, rotate_heads
from scx.kernels.host.rows import prefetch_row

# A layer's maps: (maps, column blocks, D + 1, lanes).
_MAPS = array(float32, 4)
# Rows at a time, so that a map is read from the cache once for all of them.
_ROWS = 8


def pack(maps: torch.Tensor) -> np.ndarray:
    """Maps, each above its offset, as the kernels take them.

    float32 (..., maps, D + 1, D) becomes (..., maps, column blocks, D + 1, lanes), padded
    to whole blocks.
    """
    lanes = panel_lanes()
    padded = torch.nn.functional.pad(maps, (0, -maps.shape[-1] % lanes))
    blocks = padded.unflatten(-1, (-1, lanes)).transpose(-2, -3)
    return blocks.contiguous().numpy()


@functools.cache
def encode_features_kernel(dtype: torch.dtype) -> Callable:
    rows, rank, positions = array(element_of(dtype), 2), array(int32, 1), array(int64, 1)
    cos_sin = array(float32, 2)
    rotate, map_heads = rotate_heads(dtype), _map_heads(dtype)

    @kernel(void(rows, rows, rank, positions, cos_sin, _MAPS, intp, boolean, intp, intp))
    def encode_features(
        src, dst, rank, positions, cos_sin, maps, num_heads, is_neox_style, first, last
    ):
        """Like `permutation.encode_features`, with 3M packed maps as its key: those of
        queries, then keys, then values."""
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
    rows, map_heads = array(element_of(dtype), 2), _map_heads(dtype)

    @kernel(void(rows, rows, _MAPS, intp, intp))
    def decode_features(src, dst, maps, first, last):
        """Like `permutation.decode_features`, with M packed maps as its key."""
        for begin in range(first, last, _ROWS):
            end = min(begin + _ROWS, last)
            map_heads(src[begin:end], dst[begin:end], 0, dst.shape[1], maps)

    return decode_features


@functools.cache
def _map_heads(dtype: torch.dtype) -> Callable:
    widen, narrow = conversions(dtype)
    multiply = panel_function(panel_lanes())

    @helper
    def map_heads(src, dst, first, last, maps):
        """Map the heads in columns [first, last) of a few rows: M groups, a map each."""
        kv_heads, blocks, rows_of_map, lanes = maps.shape
        head_dim, width = rows_of_map - 1, blocks * lanes
        group = (last - first) // (kv_heads * head_dim)
        count = len(src) * group
        # The last call multiplies vectors beyond `count` too; nobody reads those.
        room = (count + VECTORS - 1) // VECTORS * VECTORS
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
                for n in range(0, count, VECTORS):
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
