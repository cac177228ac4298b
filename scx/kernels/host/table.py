"""Fused forms of `scx.codecs` for the host's cores.

If the host is the secure device, every step of an encoded layer waits for its rows and
features to be encoded and decoded. Each of these kernels does its work in one pass over
memory. numba compiles them. They hold neither Python objects nor the GIL and start no
threads. They work on a range of rows, so that several workers can share a step. The
codec is their specification: they calculate in float32, and whatever they only move or
rotate equals its results bit for bit, except for the sign and payload of a NaN.

Letters are those of the codec; R is the number of features of a head that rotate. An
`element` is float32, or the uint16 view of a bfloat16 or float16, which numba lacks.
All arrays are C-contiguous, and an array that is written overlaps no other. Indices are
not checked.
"""

import functools
import importlib
from collections.abc import Callable
from typing import NamedTuple, Protocol, cast

import numpy as np
import torch

from scx.kernels.host import rows


class FeatureKernels(Protocol):
    """What a module of `scx.kernels.host` provides if a codec names it. Its kernels take
    the arguments of those in `scx.kernels.host.permutation`, with keys of its own."""

    def pack(self, keys: torch.Tensor) -> np.ndarray:
        """One of FeatureCodec.tables of one or more layers, (..., as in the codec), as an
        array that the kernels take, (..., one layer's)."""
        ...

    def encode_features_kernel(self, dtype: torch.dtype) -> Callable:
        """encode_features(src, dst, rank, positions, cos_sin, key, num_heads,
        is_neox_style, first, last)"""
        ...

    def decode_features_kernel(self, dtype: torch.dtype) -> Callable:
        """decode_features(src, dst, key, first, last)"""
        ...


class HostKernels(NamedTuple):
    """The kernels for one element type and one codec: numba functions, callable from
    compiled code.

    They write rows [first, last), which are intp like every size here.
    """

    encode_rows: Callable
    encode_features: Callable
    decode_features: Callable
    draw_permutation: Callable
    fill_random: Callable
    pack: Callable[[torch.Tensor], np.ndarray]
    """A Python function: a codec's keys as an array that the kernels take."""


@functools.cache
def host_kernels(dtype: torch.dtype, features: str) -> HostKernels:
    """Compile the kernels for bfloat16, float16 or float32, in a few seconds.

    `features` names the module of `scx.kernels.host` that has the codec's own: see
    FeatureKernels.
    """
    module = importlib.import_module(f"scx.kernels.host.{features}")
    kernels = cast(FeatureKernels, module)
    return HostKernels(
        encode_rows=rows.encode_rows_kernel(dtype),
        encode_features=kernels.encode_features_kernel(dtype),
        decode_features=kernels.decode_features_kernel(dtype),
        draw_permutation=rows.draw_permutation_kernel(),
        fill_random=rows.fill_random_kernel(rows.libc_getrandom()),
        pack=kernels.pack,
    )
