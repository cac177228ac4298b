"""Fused forms of `scx.codecs` for the cores of the host.

Where the secure device is the host itself, every step of an encoded layer
waits for its rows and features to be encoded and decoded. These kernels do
each of that in one pass over memory. numba compiles them, and they hold no
Python object and no GIL and start no threads: they work on a range of rows, so
that the workers of a compiled loop can share a step. The codec is their
specification: they calculate in float32, and what they only move or rotate is
equal to its results bit for bit, but for the sign and payload of a NaN.

Letters: those of the codec, and R features of a head that turn. An `element`
is float32, or the uint16 view of a bfloat16 or float16, which numba does not
have. All arrays are C-contiguous, and one that is written overlaps no other.
Indices are not checked.
"""

import functools
from collections.abc import Callable
from typing import NamedTuple

import torch

from scx.kernels.host import affine, permutation, rows
from scx.kernels.host.compiled import element_of

_FEATURES = {"permutation": permutation, "affine": affine}


class HostKernels(NamedTuple):
    """The kernels for one element type and one codec of features: numba functions,
    callable from others.

    Rows are written in [first, last), which like every size here is intp.
    """

    encode_rows: Callable
    encode_features: Callable
    decode_features: Callable
    draw_permutation: Callable
    fill_random: Callable
    pack: Callable
    """A Python function: the keys of a codec as an array that the kernels take."""
    key: str
    """numba's type of a layer's packed key."""


@functools.cache
def host_kernels(dtype: torch.dtype, codec: str) -> HostKernels:
    """Compile the kernels for bfloat16, float16 or float32 and for one of
    `scx.keys.CODECS`, in a few seconds."""
    features = _FEATURES[codec]
    return HostKernels(
        encode_rows=rows.encode_rows_kernel(element_of(dtype)),
        encode_features=features.encode_features_kernel(dtype),
        decode_features=features.decode_features_kernel(dtype),
        draw_permutation=rows.draw_permutation_kernel(),
        fill_random=rows.fill_random_kernel(rows.libc_getrandom()),
        pack=features.pack,
        key=features.KEY,
    )
