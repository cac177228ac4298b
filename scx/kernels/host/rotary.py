"""RoPE on the cores of the host."""

import functools
from collections.abc import Callable

import numpy as np
import torch

from scx.kernels.host.compiled import helper
from scx.kernels.host.llvm import converters, load_once


@helper
def angles_at(cos_sin, positions, row):
    """The angles in `cos_sin` (max_position, R) for the position of a row.

    Positions come from the accelerator, which could change one between a check and its
    use. One that the table does not have counts as the nearest that it has, as in
    `codec.apply_rotary`.
    """
    position = load_once(positions.ctypes.data + 8 * row)
    return cos_sin[min(max(position, 0), len(cos_sin) - 1)]


@functools.cache
def rotate_heads(dtype: torch.dtype) -> Callable:
    """`codec.apply_rotary` of one row's heads, bit for bit."""
    widen, narrow = converters(dtype)

    @helper
    def rotate_heads(src, dst, cos_sin, head_dim, is_neox_style):
        """Turn the heads in `src` (heads x D) by one position's angles `cos_sin`."""
        rotary_dim = np.uintp(cos_sin.size)
        half = rotary_dim // np.uintp(2)
        for start in range(0, src.size, head_dim):
            head, turned = src[start : start + head_dim], dst[start : start + head_dim]
            # Two loops, as a stride known only at run time would not vectorise.
            if is_neox_style:
                for i in range(half):
                    a, b = widen(head[i]), widen(head[i + half])
                    cos, sin = cos_sin[i], cos_sin[i + half]
                    turned[i] = narrow(a * cos - b * sin)
                    turned[i + half] = narrow(b * cos + a * sin)
            else:
                for i in range(half):
                    even = np.uintp(2) * i
                    odd = even + np.uintp(1)
                    a, b = widen(head[even]), widen(head[odd])
                    cos, sin = cos_sin[i], cos_sin[i + half]
                    turned[even] = narrow(a * cos - b * sin)
                    turned[odd] = narrow(b * cos + a * sin)
            for i in range(rotary_dim, np.uintp(head_dim)):
                turned[i] = head[i]

    return rotate_heads
