"""All of this package's LLVM code: what numba does not have, for its compiled functions.

Each function here builds an intrinsic, which compiled code calls like any other
function. This is the one file that uses llvmlite and the inner modules of numba, neither
of which promises to stay as it is; tests/test_llvm.py has a test for each intrinsic.
Addresses are intp. Typed pointers serve, as llvmlite 0.44 knows no others.
"""

import functools
import platform
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from llvmlite import binding, ir
from numba import float32, int64, intp, uint16
from numba.core import cgutils
from numba.core.typing import Signature, signature
from numba.extending import intrinsic

I8, I16, I32, I64 = (ir.IntType(bits) for bits in (8, 16, 32, 64))
HALF, FLOAT = ir.HalfType(), ir.FloatType()


def _call(builder: Any, name: str, result: ir.Type, *arguments: Any) -> Any:
    """Call one of LLVM's own intrinsics."""
    kind = ir.FunctionType(result, [argument.type for argument in arguments])
    function = cgutils.get_or_insert_function(builder.module, kind, name)
    return builder.call(function, arguments)


# Words that threads or devices share, of 64 bits each, at an address.


def _load(order: str) -> Any:
    def code(typing_context, address):
        def emit(context, builder, signature, arguments):
            pointer = builder.inttoptr(arguments[0], I64.as_pointer())
            return builder.load_atomic(pointer, order, 8)

        return signature(int64, intp), emit

    return intrinsic(code)


def _store_release_code(typing_context, address, value):
    def emit(context, builder, signature, arguments):
        pointer = builder.inttoptr(arguments[0], I64.as_pointer())
        builder.store_atomic(arguments[1], pointer, "release", 8)
        return arguments[1]

    return signature(int64, intp, int64), emit


def _compare_exchange_code(typing_context, address, expected, value):
    def emit(context, builder, signature, arguments):
        pointer = builder.inttoptr(arguments[0], I64.as_pointer())
        order = ("acq_rel", "acquire")
        result = builder.cmpxchg(pointer, arguments[1], arguments[2], *order)
        return builder.zext(builder.extract_value(result, 1), I64)

    return signature(int64, intp, int64, int64), emit


def _relax_code(typing_context):
    def emit(context, builder, signature, arguments):
        if platform.machine() in ("x86_64", "AMD64"):
            _call(builder, "llvm.x86.sse2.pause", ir.VoidType())
        return I64(0)

    return signature(int64), emit


def _prefetch_code(typing_context, address):
    def emit(context, builder, signature, arguments):
        pointer = builder.inttoptr(arguments[0], I8.as_pointer())
        # To be read, used soon, data.
        hints = [I32(hint) for hint in (0, 3, 1)]
        _call(builder, "llvm.prefetch.p0i8", ir.VoidType(), pointer, *hints)
        return I64(0)

    return signature(int64, intp), emit


# Their Python signature is not the one that compiled code calls.
load_acquire: Any = _load("acquire")
"""The word at an address, and all that was written before its release."""
load_once: Any = _load("monotonic")
"""The word at an address, read once: a word that another device may change meanwhile can
be checked and then used."""
store_release: Any = intrinsic(_store_release_code)
"""Write a word after all that was written before."""
compare_exchange: Any = intrinsic(_compare_exchange_code)
"""1 if the word at an address was as expected and now has the value, else 0."""
relax: Any = intrinsic(_relax_code)
"""Tell an x86 core that this is a spin loop; others do not need it."""
prefetch: Any = intrinsic(_prefetch_code)
"""Have the cache line at an address on its way into the core's caches."""


# Conversions between float32 and 16-bit floats, which numba does not have and compiled
# code holds as uint16. Of scalars or vectors.


def _shaped(kind: ir.Type, like: ir.Type) -> ir.Type:
    """The scalar type `kind`, or a vector of it if `like` is a vector."""
    return ir.VectorType(kind, like.count) if isinstance(like, ir.VectorType) else kind


def _constant(kind: ir.Type, value: int) -> ir.Constant:
    """`value`, in each lane if `kind` is a vector."""
    lanes = kind.count if isinstance(kind, ir.VectorType) else None
    return ir.Constant(kind, value if lanes is None else [value] * lanes)


def _widen_bfloat16(builder: Any, bits: Any) -> Any:
    wide = _shaped(I32, bits.type)
    shifted = builder.shl(builder.zext(bits, wide), _constant(wide, 16))
    return builder.bitcast(shifted, _shaped(FLOAT, bits.type))


def _narrow_bfloat16(builder: Any, value: Any) -> Any:
    """Round to nearest, ties to even: integer arithmetic that LLVM vectorises.

    A NaN has no case of its own. One that comes here is the machine's or a bfloat16's,
    since no angle has one: its low half is 0, and rounding does not carry into the rest.
    """
    wide = _shaped(I32, value.type)
    bits, sixteen = builder.bitcast(value, wide), _constant(wide, 16)
    odd = builder.and_(builder.lshr(bits, sixteen), _constant(wide, 1))
    rounded = builder.add(builder.add(bits, _constant(wide, 0x7FFF)), odd)
    return builder.trunc(builder.lshr(rounded, sixteen), _shaped(I16, value.type))


def _widen_float16(builder: Any, bits: Any) -> Any:
    halves = builder.bitcast(bits, _shaped(HALF, bits.type))
    return builder.fpext(halves, _shaped(FLOAT, bits.type))


def _narrow_float16(builder: Any, value: Any) -> Any:
    halves = builder.fptrunc(value, _shaped(HALF, value.type))
    return builder.bitcast(halves, _shaped(I16, value.type))


class _Conversion(NamedTuple):
    """Functions of a builder and a value that emit the conversion."""

    widen: Callable
    narrow: Callable


_CONVERSIONS = {
    torch.bfloat16: _Conversion(_widen_bfloat16, _narrow_bfloat16),
    torch.float16: _Conversion(_widen_float16, _narrow_float16),
}


def _conversion(types: Signature, emit: Callable) -> Callable:
    @intrinsic
    def convert(typing_context, value):
        return types, lambda context, builder, types, values: emit(builder, *values)

    return convert


@functools.cache
def converters(dtype: torch.dtype) -> tuple[Callable, Callable]:
    """Functions of one element: widen it to float32, and round a float32 to it, to
    nearest with ties to even. Both do nothing if `dtype` is float32."""
    if dtype == torch.float32:
        same = _conversion(signature(float32, float32), lambda builder, value: value)
        return same, same
    widen, narrow = _CONVERSIONS[dtype]
    to_float, to_bits = signature(float32, uint16), signature(uint16, float32)
    return _conversion(to_float, widen), _conversion(to_bits, narrow)


# One head of 16-bit features in AVX-512 registers: rotated, permuted, or both. LLVM makes
# scalar loads and stores of a gather of 16-bit elements. `vpermi2w` picks 32 of them at
# once out of two registers, so a head of 128 needs two of them and a blend for each 32
# results. The rotation before it stays in registers.

_LANES = 32
_REGISTER, _FLOATS = ir.VectorType(I16, _LANES), ir.VectorType(FLOAT, _LANES)


def has_head_function() -> bool:
    """Whether this machine's cores have AVX-512 for bytes and words."""
    return binding.get_host_cpu_features().get("avx512bw", False)


def _part(builder: Any, base: Any, index: int, kind: ir.VectorType) -> Any:
    """A pointer to the vector that starts at element 32 x `index` from address `base`."""
    size = 2 if kind is _REGISTER else 4
    address = builder.add(base, ir.Constant(base.type, size * _LANES * index))
    return builder.inttoptr(address, kind.as_pointer())


def _load_part(
    builder: Any, base: Any, index: int, kind: ir.VectorType = _REGISTER
) -> Any:
    return builder.load(_part(builder, base, index, kind), align=2)


def _permute(builder: Any, table: list[Any], key: Any, dst: Any) -> None:
    """Feature d of `dst` becomes feature key[d] of the registers in `table`."""
    for i in range(len(table)):
        index = _load_part(builder, key, i)
        # Bits 0 to 5 pick out of a pair of registers, bit 6 picks the pair.
        picked = [
            _call(
                builder,
                "llvm.x86.avx512.vpermi2var.hi.512",
                _REGISTER,
                table[j],
                index,
                table[j + 1],
            )
            for j in range(0, len(table), 2)
        ]
        if len(picked) == 2:
            pair = builder.and_(index, _constant(_REGISTER, 64))
            high = builder.icmp_unsigned("!=", pair, _constant(_REGISTER, 0))
            picked = [builder.select(high, picked[1], picked[0])]
        builder.store(picked[0], _part(builder, dst, i, _REGISTER), align=2)


def _rotate(builder: Any, table: list[Any], cos_sin: Any, dtype: torch.dtype) -> None:
    """Turn the registers in `table`, neox style, by the angles at address `cos_sin`."""
    widen, narrow = _CONVERSIONS[dtype]
    half = len(table) // 2
    for i in range(half):
        first, second = (widen(builder, table[j]) for j in (i, i + half))
        cos, sin = (_load_part(builder, cos_sin, j, _FLOATS) for j in (i, i + half))
        new_first = builder.fsub(builder.fmul(first, cos), builder.fmul(second, sin))
        new_second = builder.fadd(builder.fmul(second, cos), builder.fmul(first, sin))
        table[i] = narrow(builder, new_first)
        table[i + half] = narrow(builder, new_second)


@functools.cache
def head_function(head_dim: int, rotated: torch.dtype | None) -> Any:
    """f(src, dst, key, cos_sin): addresses of one head, (head_dim,), which is 64 or 128.

    Feature d of `dst`, uint16, becomes feature key[d] of `src`, uint16 both. If `rotated`
    is bfloat16 or float16, that is after a rotation in neox style of all the features by
    `cos_sin`, float32: cosines, then sines. Otherwise `cos_sin` is ignored.
    """

    def code(typing_context, src, dst, key, cos_sin):
        def emit(context, builder, signature, arguments):
            src, dst, key, cos_sin = arguments
            table = [_load_part(builder, src, i) for i in range(head_dim // _LANES)]
            if rotated is not None:
                _rotate(builder, table, cos_sin, rotated)
            _permute(builder, table, key, dst)
            return I64(0)

        return signature(int64, intp, intp, intp, intp), emit

    return intrinsic(code)


# A few vectors times a matrix. LLVM leaves the sums of such a loop in memory; here they
# stay in registers.

VECTORS = 4
"""Vectors that are multiplied at once: each value of the matrix is read once for them."""


def lanes() -> int:
    """Columns at once, so that two or four registers hold a vector's sums: eight of the
    32 registers of AVX-512, or of the 16 of AVX2, are sums then."""
    return 32 if binding.get_host_cpu_features().get("avx512f", False) else 16


@functools.cache
def panel_function(lanes: int) -> Any:
    """f(x, w, y, depth, width), the first three addresses of float32.

    Writes y[v, :lanes] = w[depth] + the sum over i < depth of x[v, i] * w[i] for
    v < VECTORS. `x` is (VECTORS, depth), `w` (depth + 1, lanes), and `y` has rows of
    `width` elements.
    """
    floats = ir.VectorType(FLOAT, lanes)

    def code(typing_context, x, w, y, depth, width):
        def emit(context, builder, signature, arguments):
            x, w, y, depth, width = arguments

            def at(base, index, kind):
                offset = builder.mul(index, ir.Constant(index.type, 4))
                return builder.inttoptr(builder.add(base, offset), kind.as_pointer())

            def row_of_w(i):
                index = builder.mul(i, ir.Constant(i.type, lanes))
                return builder.load(at(w, index, floats), align=4)

            def spread(value):
                none = ir.Constant(floats, ir.Undefined)
                first = builder.insert_element(none, value, I32(0))
                mask = ir.Constant(ir.VectorType(I32, lanes), [0] * lanes)
                return builder.shuffle_vector(first, first, mask)

            sums = [cgutils.alloca_once(builder, floats) for _ in range(VECTORS)]
            for total in sums:
                builder.store(row_of_w(depth), total)
            with cgutils.for_range(builder, depth) as loop:
                row = row_of_w(loop.index)
                for v, total in enumerate(sums):
                    start = builder.mul(depth, ir.Constant(depth.type, v))
                    value = builder.load(at(x, builder.add(start, loop.index), FLOAT))
                    factors = spread(value), row, builder.load(total)
                    fma = f"llvm.fma.v{lanes}f32"
                    builder.store(_call(builder, fma, floats, *factors), total)
            for v, total in enumerate(sums):
                start = builder.mul(width, ir.Constant(width.type, v))
                builder.store(builder.load(total), at(y, start, floats), align=4)
            return I64(0)

        return signature(int64, intp, intp, intp, intp, intp), emit

    return intrinsic(code)
