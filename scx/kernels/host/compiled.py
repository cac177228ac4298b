"""What the host's compiled functions are made with and of."""

import ctypes
from collections.abc import Callable
from typing import Any

import numba
import torch

from scx.kernels.host.llvm import relax

helper = numba.njit(
    nogil=True, error_model="numpy", no_cpython_wrapper=True, no_cfunc_wrapper=True
)
"""For a function that only compiled code calls."""

# About 40 ns each. After so many a waiting thread lets others have its core now and
# then, as there may be more threads than cores.
_SPINS_ALONE = 250
_SPINS_PER_YIELD = 25


def kernel(types: str) -> Callable:
    """Like `numba.njit`, but compiles at once: no step waits for it."""
    return numba.njit(types, nogil=True, error_model="numpy")


def element_of(dtype: torch.dtype) -> str:
    """numba's name of an element."""
    return "float32" if dtype == torch.float32 else "uint16"


def libc(name: str, *arguments: Any) -> Callable:
    """A function of the C library that takes `arguments` and returns an int."""
    function = ctypes.CDLL(None)[name]
    function.argtypes = arguments
    function.restype = ctypes.c_int
    return function


_sched_yield = libc("sched_yield")


@helper
def spin(count):
    """Wait for a moment, the `count`-th in a row."""
    relax()
    if count > _SPINS_ALONE and count % _SPINS_PER_YIELD == 0:
        _sched_yield()
