"""Conversions between 16-bit floats and float32 in LLVM code, of scalars or vectors.

numba has no 16-bit floats, so compiled code holds them as uint16.
"""

from typing import Any, NamedTuple

import torch
from llvmlite import ir

I16, I32, HALF, FLOAT = ir.IntType(16), ir.IntType(32), ir.HalfType(), ir.FloatType()


def shaped(kind: ir.Type, like: ir.Type) -> ir.Type:
    """The scalar type `kind`, or a vector of it where `like` is a vector."""
    return ir.VectorType(kind, like.count) if isinstance(like, ir.VectorType) else kind


def constant(kind: ir.Type, value: int) -> ir.Constant:
    """`value`, in each lane where `kind` is a vector."""
    lanes = kind.count if isinstance(kind, ir.VectorType) else None
    return ir.Constant(kind, value if lanes is None else [value] * lanes)


def _widen_bfloat16(builder: Any, bits: Any) -> Any:
    wide = shaped(I32, bits.type)
    shifted = builder.shl(builder.zext(bits, wide), constant(wide, 16))
    return builder.bitcast(shifted, shaped(FLOAT, bits.type))


def _narrow_bfloat16(builder: Any, value: Any) -> Any:
    """Round to nearest, ties to even: integer arithmetic that LLVM vectorises.

    A NaN has no case of its own. One that comes here is the machine's or a
    bfloat16's, as no angle has one: its low half is 0, and rounding does not
    carry into the rest.
    """
    wide = shaped(I32, value.type)
    bits, sixteen = builder.bitcast(value, wide), constant(wide, 16)
    odd = builder.and_(builder.lshr(bits, sixteen), constant(wide, 1))
    rounded = builder.add(builder.add(bits, constant(wide, 0x7FFF)), odd)
    return builder.trunc(builder.lshr(rounded, sixteen), shaped(I16, value.type))


def _widen_float16(builder: Any, bits: Any) -> Any:
    halves = builder.bitcast(bits, shaped(HALF, bits.type))
    return builder.fpext(halves, shaped(FLOAT, bits.type))


def _narrow_float16(builder: Any, value: Any) -> Any:
    halves = builder.fptrunc(value, shaped(HALF, value.type))
    return builder.bitcast(halves, shaped(I16, value.type))


class Converters(NamedTuple):
    """Functions of an LLVM builder and a value that emit code for the conversion."""

    widen: Any
    """uint16 to float32."""
    narrow: Any
    """float32 to uint16, rounded to nearest, ties to even."""


CONVERTERS = {
    torch.bfloat16: Converters(_widen_bfloat16, _narrow_bfloat16),
    torch.float16: Converters(_widen_float16, _narrow_float16),
}
