"""A few vectors times a matrix in the host's vector registers, for other compiled code.

LLVM leaves the sums of such a loop in memory; here they stay in registers.
"""

from typing import Any

from llvmlite import binding, ir
from numba import int64, intp
from numba.core import cgutils
from numba.core.typing import signature
from numba.extending import intrinsic

from scx.kernels.host.converters import FLOAT

VECTORS = 4
"""Vectors that are multiplied at once: each value of the matrix is read once for them."""


def lanes() -> int:
    """Columns at once, so that two or four registers hold a vector's sums: eight of the
    32 registers of AVX-512, or of the 16 of AVX2, are sums then."""
    return 32 if binding.get_host_cpu_features().get("avx512f", False) else 16


def panel_function(lanes: int) -> Any:
    """f(x, w, y, depth, width) for compiled code, with addresses of float32.

    Writes y[v, :lanes] = w[depth] + the sum over i < depth of x[v, i] * w[i] for
    v < VECTORS. `x` is (VECTORS, depth), `w` (depth + 1, lanes), and `y` has rows of
    `width` elements.
    """
    floats = ir.VectorType(FLOAT, lanes)

    def code(typing_context, x, w, y, depth, width):
        def emit(context, builder, signature, arguments):
            x, w, y, depth, width = arguments
            fma = cgutils.get_or_insert_function(
                builder.module,
                ir.FunctionType(floats, [floats] * 3),
                f"llvm.fma.v{lanes}f32",
            )

            def at(base, index, kind):
                offset = builder.mul(index, ir.Constant(index.type, 4))
                return builder.inttoptr(builder.add(base, offset), kind.as_pointer())

            def row_of_w(i):
                index = builder.mul(i, ir.Constant(i.type, lanes))
                return builder.load(at(w, index, floats), align=4)

            def spread(value):
                first = builder.insert_element(
                    ir.Constant(floats, ir.Undefined), value, ir.IntType(32)(0)
                )
                mask = ir.Constant(ir.VectorType(ir.IntType(32), lanes), [0] * lanes)
                return builder.shuffle_vector(first, first, mask)

            sums = [cgutils.alloca_once(builder, floats) for _ in range(VECTORS)]
            for total in sums:
                builder.store(row_of_w(depth), total)
            with cgutils.for_range(builder, depth) as loop:
                row = row_of_w(loop.index)
                for v, total in enumerate(sums):
                    start = builder.mul(depth, ir.Constant(depth.type, v))
                    value = builder.load(at(x, builder.add(start, loop.index), FLOAT))
                    added = builder.call(fma, [spread(value), row, builder.load(total)])
                    builder.store(added, total)
            for v, total in enumerate(sums):
                start = builder.mul(width, ir.Constant(width.type, v))
                builder.store(builder.load(total), at(y, start, floats), align=4)
            return ir.Constant(ir.IntType(64), 0)

        return signature(int64, intp, intp, intp, intp, intp), emit

    return intrinsic(code)
