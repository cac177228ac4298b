"""How the host's functions are compiled, and the types that they share."""

import ctypes
import functools
from collections.abc import Callable
from typing import Any

import numba
import torch
from numba import types

_internal = functools.partial(
    numba.njit,
    nogil=True,
    error_model="numpy",
    no_cpython_wrapper=True,
    no_cfunc_wrapper=True,
)
helper = _internal()
"""Decorates a function that only compiled code calls."""
inlined = _internal(forceinline=True)
"""Like `helper`, but always inlined. The worker's functions pass tuples of many arrays to
each other, and copying those would take longer than the work of a short trip."""


def kernel(signature: Any) -> Callable:
    """Like `numba.njit`, but compiles at once, so that no step waits for it."""
    return numba.njit(signature, nogil=True, error_model="numpy")


def element_of(dtype: torch.dtype) -> types.Type:
    """numba's type of an element."""
    return types.float32 if dtype == torch.float32 else types.uint16


def array(element: types.Type, dimensions: int) -> types.Array:
    """numba's type of a C-contiguous array."""
    return types.Array(element, dimensions, "C")


def libc(name: str, *arguments: Any) -> Callable:
    """A function of the C library that takes `arguments` and returns an int."""
    function = ctypes.CDLL(None)[name]
    function.argtypes = arguments
    function.restype = ctypes.c_int
    return function
