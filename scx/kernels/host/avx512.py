"""One head of 16-bit features in AVX-512 registers: rotated, permuted, or both.

LLVM makes scalar loads and stores of a gather of 16-bit elements. `vpermi2w`
picks 32 of them at once out of two registers, so a head of 128 needs two of
them and a blend for each 32 results. The rotation before it stays in registers.
"""

import functools
from typing import Any

import torch
from llvmlite import binding, ir
from numba import int64, intp
from numba.core import cgutils
from numba.core.typing import signature
from numba.extending import intrinsic

from scx.kernels.host.converters import CONVERTERS, FLOAT, I16, Converters, constant

_LANES = 32
_REGISTER = ir.VectorType(I16, _LANES)
_FLOATS = ir.VectorType(FLOAT, _LANES)
_PERMUTE = "llvm.x86.avx512.vpermi2var.hi.512"


def is_available() -> bool:
    """Whether this machine's cores have AVX-512 for bytes and words."""
    return binding.get_host_cpu_features().get("avx512bw", False)


def _part(builder: Any, base: Any, index: int, kind: ir.VectorType) -> Any:
    """A pointer to the vector that starts at element 32 x `index` from address `base`."""
    size = 2 if kind is _REGISTER else 4
    address = builder.add(base, ir.Constant(base.type, size * _LANES * index))
    return builder.inttoptr(address, kind.as_pointer())


def _load(builder: Any, base: Any, index: int, kind: ir.VectorType = _REGISTER) -> Any:
    return builder.load(_part(builder, base, index, kind), align=2)


def _permute(builder: Any, table: list[Any], key: Any, dst: Any) -> None:
    """Feature d of `dst` becomes feature key[d] of the registers in `table`."""
    kind = ir.FunctionType(_REGISTER, [_REGISTER] * 3)
    permute = cgutils.get_or_insert_function(builder.module, kind, _PERMUTE)
    for i in range(len(table)):
        index = _load(builder, key, i)
        # Bits 0 to 5 pick out of a pair of registers, bit 6 picks the pair.
        picked = [
            builder.call(permute, [table[j], index, table[j + 1]])
            for j in range(0, len(table), 2)
        ]
        if len(picked) == 2:
            pair = builder.and_(index, constant(_REGISTER, 64))
            high = builder.icmp_unsigned("!=", pair, constant(_REGISTER, 0))
            picked = [builder.select(high, picked[1], picked[0])]
        builder.store(picked[0], _part(builder, dst, i, _REGISTER), align=2)


def _rotate(builder: Any, table: list[Any], cos_sin: Any, converters: Converters) -> None:
    """Turn the registers in `table`, neox style, by the angles at address `cos_sin`."""
    half = len(table) // 2
    for i in range(half):
        first, second = (converters.widen(builder, table[j]) for j in (i, i + half))
        cos, sin = (_load(builder, cos_sin, j, _FLOATS) for j in (i, i + half))
        new_first = builder.fsub(builder.fmul(first, cos), builder.fmul(second, sin))
        new_second = builder.fadd(builder.fmul(second, cos), builder.fmul(first, sin))
        table[i] = converters.narrow(builder, new_first)
        table[i + half] = converters.narrow(builder, new_second)


@functools.cache
def head_function(head_dim: int, rotated: torch.dtype | None) -> Any:
    """f(src, dst, key, cos_sin) for compiled code: addresses of one head, (head_dim,).

    Feature d of `dst`, uint16, becomes feature key[d] of `src`, uint16 both. Where
    `rotated` is bfloat16 or float16, that is after a rotation in neox style of all
    the features by `cos_sin`, float32: cosines, then sines. It is not read else.
    """

    def code(typing_context, src, dst, key, cos_sin):
        def emit(context, builder, signature, arguments):
            src, dst, key, cos_sin = arguments
            table = [_load(builder, src, i) for i in range(head_dim // _LANES)]
            if rotated is not None:
                _rotate(builder, table, cos_sin, CONVERTERS[rotated])
            _permute(builder, table, key, dst)
            return ir.Constant(ir.IntType(64), 0)

        return signature(int64, intp, intp, intp, intp), emit

    return intrinsic(code)
