"""Words that threads or devices share: loads, stores and exchanges in their order, and
how to wait for one.

numba has none of these. All are of 64 bits, at an address.
"""

import ctypes
import platform
from collections.abc import Callable
from typing import Any

from llvmlite import ir
from numba import int64, intp
from numba.core import cgutils
from numba.core.typing import signature
from numba.extending import intrinsic

from scx.kernels.host.compiled import helper

_I64 = ir.IntType(64)

# About 40 ns each. After so many a waiting thread lets others have its core now and
# then, as there may be more threads than cores.
_SPINS_ALONE = 250
_SPINS_PER_YIELD = 25


def _load(order: str) -> Any:
    def code(typing_context, address):
        def emit(context, builder, signature, arguments):
            pointer = builder.inttoptr(arguments[0], _I64.as_pointer())
            return builder.load_atomic(pointer, order, 8)

        return signature(int64, intp), emit

    return intrinsic(code)


def _store_release_code(typing_context, address, value):
    def emit(context, builder, signature, arguments):
        pointer = builder.inttoptr(arguments[0], _I64.as_pointer())
        builder.store_atomic(arguments[1], pointer, "release", 8)
        return arguments[1]

    return signature(int64, intp, int64), emit


def _compare_exchange_code(typing_context, address, expected, value):
    def emit(context, builder, signature, arguments):
        pointer = builder.inttoptr(arguments[0], _I64.as_pointer())
        order = ("acq_rel", "acquire")
        result = builder.cmpxchg(pointer, arguments[1], arguments[2], *order)
        return builder.zext(builder.extract_value(result, 1), _I64)

    return signature(int64, intp, int64, int64), emit


def _relax_code(typing_context):
    def emit(context, builder, signature, arguments):
        if platform.machine() in ("x86_64", "AMD64"):
            kind = ir.FunctionType(ir.VoidType(), [])
            name = "llvm.x86.sse2.pause"
            builder.call(cgutils.get_or_insert_function(builder.module, kind, name), [])
        return _I64(0)

    return signature(int64), emit


# Their Python signature is not the one that compiled code calls.
load_acquire: Any = _load("acquire")
"""The word at an address, and all that was written before its release."""
load_once: Any = _load("monotonic")
"""The word at an address, read once: a word that somebody else may change meanwhile can
be checked and then used."""
store_release: Any = intrinsic(_store_release_code)
"""Write a word after all that was written before."""
compare_exchange: Any = intrinsic(_compare_exchange_code)
"""1 if the word at an address was as expected and now has the value, else 0."""
relax: Any = intrinsic(_relax_code)
"""Tell an x86 core that this is a spin loop; others have no need of it."""


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
