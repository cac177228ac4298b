"""What the host's compiled functions are made with: decorators, elements, conversions."""

import functools
from collections.abc import Callable

import numba
import torch
from numba import float32, uint16
from numba.core.typing import Signature, signature
from numba.extending import intrinsic

from scx.kernels.host.converters import CONVERTERS

helper = numba.njit(
    nogil=True, error_model="numpy", no_cpython_wrapper=True, no_cfunc_wrapper=True
)
"""For a function that only compiled code calls."""


def kernel(types: str) -> Callable:
    """Like `numba.njit`, but compiles at once: no step waits for it."""
    return numba.njit(types, nogil=True, error_model="numpy")


def element_of(dtype: torch.dtype) -> str:
    """numba's name of an element."""
    return "float32" if dtype == torch.float32 else "uint16"


def _converter(types: Signature, emit: Callable) -> Callable:
    """A function of one value for compiled code; `emit` builds its LLVM code."""

    @intrinsic
    def convert(typing_context, value):
        return types, lambda context, builder, types, values: emit(builder, *values)

    return convert


@functools.cache
def converters(dtype: torch.dtype) -> tuple[Callable, Callable]:
    """Functions of one element that widen it to float32 and narrow it again."""
    if dtype == torch.float32:
        same = _converter(signature(float32, float32), lambda builder, value: value)
        return same, same
    widen, narrow = CONVERTERS[dtype]
    to_float, to_bits = signature(float32, uint16), signature(uint16, float32)
    return _converter(to_float, widen), _converter(to_bits, narrow)
