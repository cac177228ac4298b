"""What numba cannot say, in LLVM IR: small functions for other compiled code to call.

numba has no atomic words, no 16-bit floats and no vector registers. No other file of
this package builds IR. This one needs numba's public `intrinsic` decorator and llvmlite.
A function is not callable from Python, takes addresses as integers, and checks nothing.
"""

import functools
import platform
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from llvmlite import binding, ir
from numba import boolean, float32, int64, intp, types, uint16, void
from numba.extending import intrinsic

_VOID = ir.VoidType()
_I8, _I16, _I32, _I64 = (ir.IntType(width) for width in (8, 16, 32, 64))
_HALF, _FLOAT = ir.HalfType(), ir.FloatType()


def _compiled(signature: Any) -> Callable[[Callable], Any]:
    """Decorate `emit(builder, *arguments)`, which builds the IR of a function with this
    numba signature. An `emit` that returns None is one of a void function."""

    def decorate(emit: Callable) -> Any:
        def typing(typing_context, *arguments):
            def lower(context, builder, types, values):
                result = emit(builder, *values)
                return context.get_dummy_value() if result is None else result

            return signature, lower

        return intrinsic(functools.update_wrapper(typing, emit))

    return decorate


def _at(builder: Any, address: Any, kind: ir.Type) -> Any:
    """The pointer to a `kind` at an address.

    A typed pointer, although llvmlite means to drop them: `store_atomic` takes no opaque
    one in any version up to 0.50, and llvmlite 0.44, for vLLM 0.26, does not parse them.
    """
    return builder.inttoptr(address, kind.as_pointer())


def _call(builder: Any, name: str, result: ir.Type, *arguments: Any) -> Any:
    """Call one of LLVM's own intrinsics."""
    kind = ir.FunctionType(result, [argument.type for argument in arguments])
    return builder.call(builder.module.declare_intrinsic(name, (), kind), arguments)


@_compiled(types.voidptr(intp))
def pointer(builder, address):
    """An address as a pointer, which `numba.carray` takes."""
    return _at(builder, address, _I8)


# Words of 64 bits that threads or devices share.


@_compiled(int64(intp))
def load_acquire(builder, address):
    """The word at an address. What was written before its release can be read now."""
    return builder.load_atomic(_at(builder, address, _I64), "acquire", 8)


@_compiled(int64(intp))
def load_once(builder, address):
    """The word at an address, read once: even if another writes it meanwhile, the value
    that was checked is the value that is used."""
    return builder.load_atomic(_at(builder, address, _I64), "monotonic", 8)


@_compiled(void(intp, int64))
def store_release(builder, address, value):
    """Write a word, after everything that this thread wrote before."""
    builder.store_atomic(value, _at(builder, address, _I64), "release", 8)


@_compiled(boolean(intp, int64, int64))
def compare_exchange(builder, address, expected, value):
    """Write `value` if the word at an address is `expected`. True if it was."""
    pointer, orders = _at(builder, address, _I64), ("acq_rel", "acquire")
    return builder.extract_value(builder.cmpxchg(pointer, expected, value, *orders), 1)


@_compiled(void())
def fence(builder):
    """Order what this thread wrote before it against what it reads after it."""
    builder.fence("seq_cst")


# Hints to the core, which change no result.


@_compiled(void())
def relax(builder):
    """Tell an x86 core that this is a spin loop. Other cores do not need it."""
    if platform.machine() in ("x86_64", "AMD64"):
        _call(builder, "llvm.x86.sse2.pause", _VOID)


@_compiled(void(intp))
def prefetch(builder, address):
    """Start to bring the cache line at an address, which may be any, into the caches."""
    # To be read, used soon, data.
    hints = [_I32(hint) for hint in (0, 3, 1)]
    _call(builder, "llvm.prefetch.p0i8", _VOID, _at(builder, address, _I8), *hints)


# Conversions between 16-bit floats, which compiled code holds as uint16, and float32.
# They take scalars or vectors.


def _like(kind: ir.Type, value: Any) -> ir.Type:
    """`kind`, or a vector of as many as `value` has elements."""
    vector = isinstance(value.type, ir.VectorType)
    return ir.VectorType(kind, value.type.count) if vector else kind


def _constant(kind: ir.Type, value: int) -> ir.Constant:
    """`value`, in each lane if `kind` is a vector."""
    vector = isinstance(kind, ir.VectorType)
    return ir.Constant(kind, [value] * kind.count if vector else value)


def _widen_bfloat16(builder: Any, bits: Any) -> Any:
    wide = _like(_I32, bits)
    shifted = builder.shl(builder.zext(bits, wide), _constant(wide, 16))
    return builder.bitcast(shifted, _like(_FLOAT, bits))


def _narrow_bfloat16(builder: Any, value: Any) -> Any:
    """Integer arithmetic, which LLVM vectorises.

    NaN needs no case of its own if the low half of its bits is 0, since rounding then
    carries nothing into the rest. Here every NaN is such: it was a bfloat16 or is the
    machine's own, as no angle is one.
    """
    wide = _like(_I32, value)
    bits, sixteen = builder.bitcast(value, wide), _constant(wide, 16)
    odd = builder.and_(builder.lshr(bits, sixteen), _constant(wide, 1))
    rounded = builder.add(builder.add(bits, _constant(wide, 0x7FFF)), odd)
    return builder.trunc(builder.lshr(rounded, sixteen), _like(_I16, value))


def _widen_float16(builder: Any, bits: Any) -> Any:
    halves = builder.bitcast(bits, _like(_HALF, bits))
    return builder.fpext(halves, _like(_FLOAT, bits))


def _narrow_float16(builder: Any, value: Any) -> Any:
    halves = builder.fptrunc(value, _like(_HALF, value))
    return builder.bitcast(halves, _like(_I16, value))


class _Conversions(NamedTuple):
    """Functions of a builder and a value that emit IR."""

    widen: Any
    """uint16 to float32."""
    narrow: Any
    """float32 to uint16, rounded to nearest, ties to even."""


_CONVERSIONS = {
    torch.bfloat16: _Conversions(_widen_bfloat16, _narrow_bfloat16),
    torch.float16: _Conversions(_widen_float16, _narrow_float16),
}


@functools.cache
def conversions(dtype: torch.dtype) -> tuple[Callable, Callable]:
    """widen(element) and narrow(value) between elements of `dtype` and float32.

    Narrowing rounds to nearest, ties to even. A NaN must be a widened element or the
    result of arithmetic on such.
    """
    if dtype == torch.float32:
        same = _compiled(float32(float32))(lambda builder, value: value)
        return same, same
    widen, narrow = _CONVERSIONS[dtype]
    return _compiled(float32(uint16))(widen), _compiled(uint16(float32))(narrow)


# One head of 16-bit features in AVX-512 registers. LLVM makes scalar loads and stores of
# a gather of 16-bit elements. `vpermi2w` picks 32 of them at once from two registers, so
# a head of 128 takes two of them and a blend for each 32 results.

_WORDS = ir.VectorType(_I16, 32)
_FLOATS = ir.VectorType(_FLOAT, 32)
_PICK = "llvm.x86.avx512.vpermi2var.hi.512"


def has_head_function() -> bool:
    """Whether this machine has AVX-512 for elements of 16 bits, AVX512BW."""
    return binding.get_host_cpu_features().get("avx512bw", False)


def _vector_at(builder: Any, base: Any, index: int, kind: ir.VectorType) -> Any:
    """A pointer to the vector that starts at element 32 x `index` from address `base`."""
    size = 64 if kind is _WORDS else 128
    return _at(builder, builder.add(base, ir.Constant(base.type, size * index)), kind)


def _load(builder: Any, base: Any, index: int, kind: ir.VectorType) -> Any:
    return builder.load(_vector_at(builder, base, index, kind), align=2)


def _permute(builder: Any, head: list[Any], key: Any, dst: Any) -> None:
    """Feature d at address `dst` becomes feature key[d] of the registers in `head`."""
    for i in range(len(head)):
        index = _load(builder, key, i, _WORDS)
        # Bits 0 to 5 pick from a pair of registers, bit 6 picks the pair.
        picked = [
            _call(builder, _PICK, _WORDS, head[j], index, head[j + 1])
            for j in range(0, len(head), 2)
        ]
        if len(picked) == 2:
            pair = builder.and_(index, _constant(_WORDS, 64))
            high = builder.icmp_unsigned("!=", pair, _constant(_WORDS, 0))
            picked = [builder.select(high, picked[1], picked[0])]
        builder.store(picked[0], _vector_at(builder, dst, i, _WORDS), align=2)


def _rotate(builder: Any, head: list[Any], cos_sin: Any, dtype: torch.dtype) -> None:
    """Rotate the registers in `head`, neox style, by the angles at address `cos_sin`."""
    widen, narrow = _CONVERSIONS[dtype]
    half = len(head) // 2
    for i in range(half):
        first, second = (widen(builder, head[j]) for j in (i, i + half))
        cos, sin = (_load(builder, cos_sin, j, _FLOATS) for j in (i, i + half))
        new_first = builder.fsub(builder.fmul(first, cos), builder.fmul(second, sin))
        new_second = builder.fadd(builder.fmul(second, cos), builder.fmul(first, sin))
        head[i], head[i + half] = narrow(builder, new_first), narrow(builder, new_second)


@functools.cache
def head_function(head_dim: int, rotated: torch.dtype | None) -> Any:
    """f(src, dst, key, cos_sin): permute one head, in AVX-512 registers.

    `head_dim` is 64 or 128. `src`, `dst` and `key` are addresses of uint16 (head_dim,).
    Feature d of `dst` becomes feature key[d] of `src`. If `rotated` is bfloat16 or
    float16, the head is first rotated as a whole, neox style, by the float32 (head_dim,)
    at address `cos_sin`: cosines, then sines. Otherwise `cos_sin` is ignored.
    """

    @_compiled(void(intp, intp, intp, intp))
    def one_head(builder, src, dst, key, cos_sin):
        head = [_load(builder, src, i, _WORDS) for i in range(head_dim // 32)]
        if rotated is not None:
            _rotate(builder, head, cos_sin, rotated)
        _permute(builder, head, key, dst)

    return one_head


# A few vectors times a matrix. LLVM would leave the sums of such a loop in memory. Here
# they stay in registers.

VECTORS = 4
"""Vectors per call of a panel function. Each value of the matrix is read once for all."""


def panel_lanes() -> int:
    """Columns of a panel. They make a vector's sums fill two registers of AVX-512 or four
    of AVX2: together eight, of the 32 or 16 that there are."""
    return 32 if binding.get_host_cpu_features().get("avx512f", False) else 16


@functools.cache
def panel_function(lanes: int) -> Any:
    """f(x, w, y, depth, width): multiply VECTORS vectors by one panel of a matrix.

    Writes y[v, :lanes] = w[depth] + the sum over i < depth of x[v, i] * w[i], fused and
    in that order, for v < VECTORS and `depth` > 0. All are addresses of float32: `x` is
    (VECTORS, depth), `w` (depth + 1, lanes), and a row of `y` has `width` elements.
    """
    floats = ir.VectorType(_FLOAT, lanes)

    def pointer(builder, base, index, kind):
        return _at(builder, builder.add(base, builder.mul(index, index.type(4))), kind)

    def spread(builder, value):
        first = builder.insert_element(floats(ir.Undefined), value, _I32(0))
        mask = _constant(ir.VectorType(_I32, lanes), 0)
        return builder.shuffle_vector(first, first, mask)

    @_compiled(void(intp, intp, intp, intp, intp))
    def panel(builder, x, w, y, depth, width):
        def row_of_w(i):
            row = pointer(builder, w, builder.mul(i, i.type(lanes)), floats)
            return builder.load(row, align=4)

        offsets = row_of_w(depth)
        before, loop = builder.block, builder.append_basic_block("panel.loop")
        after = builder.append_basic_block("panel.end")
        builder.branch(loop)

        builder.position_at_end(loop)
        i = builder.phi(depth.type)
        sums = [builder.phi(floats) for _ in range(VECTORS)]
        row, added = row_of_w(i), []
        for v, total in enumerate(sums):
            place = builder.add(builder.mul(depth, depth.type(v)), i)
            value = builder.load(pointer(builder, x, place, _FLOAT))
            terms = spread(builder, value), row, total
            added.append(_call(builder, f"llvm.fma.v{lanes}f32", floats, *terms))
        following = builder.add(i, depth.type(1))
        i.add_incoming(depth.type(0), before)
        i.add_incoming(following, loop)
        for total, new in zip(sums, added, strict=True):
            total.add_incoming(offsets, before)
            total.add_incoming(new, loop)
        builder.cbranch(builder.icmp_signed("<", following, depth), loop, after)

        builder.position_at_end(after)
        for v, new in enumerate(added):
            place = builder.mul(width, width.type(v))
            builder.store(new, pointer(builder, y, place, floats), align=4)

    return panel
