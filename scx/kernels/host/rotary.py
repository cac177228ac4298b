"""RoPE on the host's cores."""

import functools
from collections.abc import Callable

import numpy as np
import torch

from scx.kernels.host.compiled import helper
from scx.kernels.host.llvm import conversions, load_once


@helper
def angles_at(cos_sin, positions, row):
    """The angles in `cos_sin` (max_position, R) for a row's position.

    Positions come from the accelerator, which could change one between its check and its
    use. A position outside the table counts as the nearest one inside, as it does in
    `scx.codecs.plain.apply_rotary`.
    """
    position = load_once(positions.ctypes.data + 8 * row)
    return cos_sin[min(max(position, 0), len(cos_sin) - 1)]


@functools.cache
def rotate_heads(dtype: torch.dtype) -> Callable:
    """`scx.codecs.plain.apply_rotary` for the heads of one row, bit for bit."""
    widen, narrow = conversions(dtype)

    @helper
    def rotate_heads(src, dst, cos_sin, head_dim, is_neox_style):
        """Rotate the heads in `src` (heads x D) by one position's angles, `cos_sin`."""
        rotary_dim = np.uintp(cos_sin.size)
        half = rotary_dim // np.uintp(2)
        for start in range(0, src.size, head_dim):
            head, turned = src[start : start + head_dim], dst[start : start + head_dim]
            # Two loops: LLVM would not vectorise a stride that it does not know.
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
