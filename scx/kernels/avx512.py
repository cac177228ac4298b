"""The permutation of a head's 16-bit features in a few AVX-512 instructions.

LLVM makes scalar loads and stores of a gather of 16-bit elements, about 0.7 ns
each on a Sapphire Rapids core. `vpermi2w` picks 32 of them at once out of two
registers, so a head of 128 needs two of them and a blend for each 32 results.
"""

from collections.abc import Callable
from typing import Any

from llvmlite import binding, ir
from numba import int64, intp
from numba.core import cgutils
from numba.core.typing import signature
from numba.extending import intrinsic

_LANES = 32
_REGISTER = ir.VectorType(ir.IntType(16), _LANES)
_PERMUTE = "llvm.x86.avx512.vpermi2var.hi.512"


def is_available() -> bool:
    """Whether this machine's cores have AVX-512 for bytes and words."""
    return binding.get_host_cpu_features().get("avx512bw", False)


def _permute_code(head_dim: int) -> Callable:
    registers = head_dim // _LANES

    def code(typing_context, src, dst, key):
        def emit(context, builder, signature, arguments):
            def part(base, index):
                address = builder.add(base, ir.Constant(base.type, 2 * _LANES * index))
                return builder.inttoptr(address, _REGISTER.as_pointer())

            src, dst, key = arguments
            kind = ir.FunctionType(_REGISTER, [_REGISTER] * 3)
            permute = cgutils.get_or_insert_function(builder.module, kind, _PERMUTE)
            table = [builder.load(part(src, i), align=2) for i in range(registers)]
            for i in range(registers):
                index = builder.load(part(key, i), align=2)
                # Bits 0 to 5 pick out of a pair of registers, bit 6 picks the pair.
                picked = [
                    builder.call(permute, [table[j], index, table[j + 1]])
                    for j in range(0, registers, 2)
                ]
                if len(picked) == 2:
                    splat = ir.Constant(_REGISTER, [64] * _LANES)
                    none = ir.Constant(_REGISTER, [0] * _LANES)
                    high = builder.icmp_unsigned("!=", builder.and_(index, splat), none)
                    picked = [builder.select(high, picked[1], picked[0])]
                builder.store(picked[0], part(dst, i), align=2)
            return ir.Constant(ir.IntType(64), 0)

        return signature(int64, intp, intp, intp), emit

    return code


# Addresses of (64,) or (128,) uint16 arrays: feature d of dst becomes src[key[d]].
permute_64: Any = intrinsic(_permute_code(64))
permute_128: Any = intrinsic(_permute_code(128))
