"""Fused forms of `scx.codec` for the cores of the host.

Where the secure device is the host itself, every step of an encoded layer
waits for its rows and features to be encoded and decoded. These kernels do
each of that in one pass over memory. numba compiles them, and they hold no
Python object and no GIL and start no threads: they work on a range of rows, so
that the workers of a compiled loop can share a step. The codec is their
specification: they calculate in float32, in its order and without fused
multiply-adds, so that results are equal to its bit for bit, but for the sign
and payload of a NaN.

Letters: those of the codec, and R features of a head that turn. An `element`
is float32, or the uint16 view of a bfloat16 or float16, which numba does not
have. All arrays are C-contiguous, and one that is written overlaps no other.
Indices are not checked.
"""

import ctypes
import functools
from collections.abc import Callable
from typing import NamedTuple

import numba
import numpy as np
import torch
from llvmlite import ir
from numba import float32, uint16
from numba.core.typing import Signature, signature
from numba.extending import intrinsic

from scx.errors import SCXUnsupportedError
from scx.kernels import avx512
from scx.kernels.avx512 import permute_64, permute_128

_I16, _I32 = ir.IntType(16), ir.IntType(32)
_F16, _F32 = ir.HalfType(), ir.FloatType()

_helper = numba.njit(
    nogil=True, error_model="numpy", no_cpython_wrapper=True, no_cfunc_wrapper=True
)


def _kernel(types: str) -> Callable:
    """Like `numba.njit`, but compiles at once: no step waits for it."""
    return numba.njit(types, nogil=True, error_model="numpy")


class HostKernels(NamedTuple):
    """The kernels for one element type: numba functions, callable from others.

    Rows are written in [first, last), which like every size here is intp.
    """

    encode_rows: Callable
    encode_features: Callable
    decode_features: Callable
    draw_permutation: Callable
    fill_random: Callable


@functools.cache
def host_kernels(dtype: torch.dtype) -> HostKernels:
    """Compile the kernels for bfloat16, float16 or float32, in a few seconds."""
    element = "float32" if dtype == torch.float32 else "uint16"
    widen, narrow = _CONVERTERS[dtype]
    return HostKernels(
        encode_rows=_encode_rows(element),
        encode_features=_encode_features(element, widen, narrow),
        decode_features=_decode_features(element),
        draw_permutation=_draw_permutation(),
        fill_random=_fill_random(_libc_getrandom()),
    )


def _converter(types: Signature, emit: Callable) -> Callable:
    """A function of one value for compiled code; `emit` builds its LLVM code."""

    @intrinsic
    def convert(typing_context, value):
        return types, lambda context, builder, types, values: emit(builder, *values)

    return convert


def _widen_bfloat16(builder, bits):
    return builder.bitcast(builder.shl(builder.zext(bits, _I32), _I32(16)), _F32)


def _narrow_bfloat16(builder, value):
    """Round to nearest, ties to even: integer arithmetic that LLVM vectorises.

    A NaN has no case of its own. One that comes here is the machine's or a
    bfloat16's, as no angle has one: its low half is 0, and rounding does not
    carry into the rest.
    """
    bits = builder.bitcast(value, _I32)
    odd = builder.and_(builder.lshr(bits, _I32(16)), _I32(1))
    rounded = builder.add(builder.add(bits, _I32(0x7FFF)), odd)
    return builder.trunc(builder.lshr(rounded, _I32(16)), _I16)


def _widen_float16(builder, bits):
    return builder.fpext(builder.bitcast(bits, _F16), _F32)


def _narrow_float16(builder, value):
    return builder.bitcast(builder.fptrunc(value, _F16), _I16)


def _same(builder, value):
    return value


_TO_FLOAT = signature(float32, uint16)
_TO_BITS = signature(uint16, float32)
_CONVERTERS = {
    torch.bfloat16: (
        _converter(_TO_FLOAT, _widen_bfloat16),
        _converter(_TO_BITS, _narrow_bfloat16),
    ),
    torch.float16: (
        _converter(_TO_FLOAT, _widen_float16),
        _converter(_TO_BITS, _narrow_float16),
    ),
    torch.float32: (_converter(signature(float32, float32), _same),) * 2,
}


@functools.cache
def _encode_rows(element: str) -> Callable:
    @_kernel(f"void({element}[:, ::1], {element}[:, ::1], int32[::1], intp, intp)")
    def encode_rows(src, dst, pi, first, last):
        """Row i of `dst` (T, columns) becomes row pi[i] of `src` (T, columns)."""
        # Here and below: with unsigned indices numba adds no case for negative
        # ones, and only then does LLVM vectorise.
        for i in range(np.uintp(first), np.uintp(last)):
            row = np.uintp(pi[i])
            for column in range(np.uintp(dst.shape[1])):
                dst[i, column] = src[row, column]

    return encode_rows


@functools.cache
def _decode_features(element: str) -> Callable:
    permute_heads = _permute_heads(element)

    @_kernel(f"void({element}[:, ::1], {element}[:, ::1], uint16[:, ::1], intp, intp)")
    def decode_features(src, dst, inverse_key, first, last):
        """Feature d of a head in `dst` becomes its feature inverse_key[m, d] in `src`.

        `src` and `dst` are (T, N x D), `inverse_key` is uint16 (M, D).
        """
        for j in range(first, last):
            permute_heads(src[j], dst[j], inverse_key)

    return decode_features


@functools.cache
def _permute_heads(element: str) -> Callable:
    @_helper
    def permute_head(src, dst, key):
        for d in range(np.uintp(key.size)):
            dst[d] = src[np.uintp(key[d])]

    @_helper
    def permute_head_avx512(src, dst, key):
        if key.size == 128:
            permute_128(src.ctypes.data, dst.ctypes.data, key.ctypes.data)
        elif key.size == 64:
            permute_64(src.ctypes.data, dst.ctypes.data, key.ctypes.data)
        else:
            permute_head(src, dst, key)

    wide = element == "uint16" and avx512.is_available()
    permute = permute_head_avx512 if wide else permute_head

    @_helper
    def permute_heads(src, dst, key):
        """One row's heads, which may be queries or keys or values: (heads x D)."""
        kv_heads, head_dim = key.shape
        group_columns = src.size // kv_heads
        for m in range(kv_heads):
            for start in range(m * group_columns, (m + 1) * group_columns, head_dim):
                end = start + head_dim
                permute(src[start:end], dst[start:end], key[m])

    return permute_heads


@functools.cache
def _encode_features(element: str, widen: Callable, narrow: Callable) -> Callable:
    permute_heads = _permute_heads(element)

    @_helper
    def rotate_heads(src, dst, cos_sin, head_dim, is_neox_style):
        """One row's heads, (heads x D), by the angles of one position, (R,)."""
        rotary_dim = np.uintp(cos_sin.size)
        half = rotary_dim // np.uintp(2)
        for start in range(0, dst.size, head_dim):
            head = src[start : start + head_dim]
            rotated = dst[start : start + head_dim]
            # Two loops, as a stride known only at run time would not vectorise.
            if is_neox_style:
                for i in range(half):
                    a, b = widen(head[i]), widen(head[i + half])
                    cos, sin = cos_sin[i], cos_sin[i + half]
                    rotated[i] = narrow(a * cos - b * sin)
                    rotated[i + half] = narrow(b * cos + a * sin)
            else:
                for i in range(half):
                    even = np.uintp(2) * i
                    odd = even + np.uintp(1)
                    a, b = widen(head[even]), widen(head[odd])
                    cos, sin = cos_sin[i], cos_sin[i + half]
                    rotated[even] = narrow(a * cos - b * sin)
                    rotated[odd] = narrow(b * cos + a * sin)
            for i in range(rotary_dim, np.uintp(head_dim)):
                rotated[i] = head[i]

    @_kernel(
        f"void({element}[:, ::1], {element}[:, ::1], int32[::1], int64[::1], "
        "float32[:, ::1], uint16[:, ::1], intp, boolean, intp, intp)"
    )
    def encode_features(
        src, dst, rank, positions, cos_sin, key, num_heads, is_neox_style, first, last
    ):
        """Rotate and permute the features of rows that `encode_rows` has shuffled.

        Row j of `dst` comes from row rank[j] of `src`, where `rank`, int32 (T,),
        is the inverse of the shuffle. Both are (T, (N + 2M) x D): queries, keys,
        values. Queries and keys turn to positions[j], int64 (T,), by `cos_sin`,
        float32 (max_position, R): cosines, then sines. Feature d of the result
        is the rotated feature key[m, d] of its head, with `key` uint16 (M, D).
        """
        kv_heads, head_dim = key.shape
        queries = num_heads * head_dim
        turning = queries + kv_heads * head_dim
        rotated = np.empty(turning, src.dtype)
        for j in range(first, last):
            row, encoded = src[rank[j]], dst[j]
            rotate_heads(row, rotated, cos_sin[positions[j]], head_dim, is_neox_style)
            permute_heads(rotated[:queries], encoded[:queries], key)
            permute_heads(rotated[queries:], encoded[queries:turning], key)
            permute_heads(row[turning:], encoded[turning:], key)

    return encode_features


@_helper
def _high_product(word, count):
    """The high 64 bits of the product of two uint64, where `count` is below 2^32."""
    half, low_bits = np.uint64(32), np.uint64(0xFFFFFFFF)
    carry = ((word & low_bits) * count) >> half
    return ((word >> half) * count + carry) >> half


@functools.cache
def _draw_permutation() -> Callable:
    @_kernel("void(uint64[::1], int32[::1], int32[::1])")
    def draw_permutation(words, pi, rank):
        """Fill `pi` (n,) with a permutation and `rank` (n,) with its inverse.

        It is a Fisher-Yates shuffle by the random `words` (n,). A draw from
        i + 1 values gives each a chance within 2^-64 of 1 / (i + 1), so that
        all n draws are less than n^2 / 2^65 from uniform in total variation:
        2^-37 at 2^14 rows.
        """
        for i in range(pi.size):
            j = np.intp(_high_product(words[i], np.uint64(i + 1)))
            pi[i] = pi[j]
            pi[j] = i
        for i in range(pi.size):
            rank[pi[i]] = i

    return draw_permutation


def _libc_getrandom() -> Callable:
    try:
        getrandom = ctypes.CDLL(None).getrandom
    except AttributeError:
        raise SCXUnsupportedError(
            "This system's C library has no getrandom; the host kernels need Linux "
            "with glibc 2.25 or newer, or musl"
        ) from None
    # The address goes in as an integer, which compiled code can advance.
    getrandom.argtypes = (ctypes.c_size_t, ctypes.c_size_t, ctypes.c_uint)
    getrandom.restype = ctypes.c_ssize_t
    return getrandom


def _fill_random(getrandom: Callable) -> Callable:
    @_kernel("intp(uint64[::1])")
    def fill_random(words):
        """Fill `words` (n,) from getrandom(2); 0, or 1 if that failed.

        After a 1 the words are not random, and the caller must stop.
        """
        address, left = words.ctypes.data, words.nbytes
        while left > 0:
            granted = getrandom(address, left, 0)
            if granted < 0:
                # A signal may have interrupted it, as none does up to 256 bytes.
                granted = getrandom(address, min(left, 256), 0)
            if granted <= 0:
                return 1
            address += granted
            left -= granted
        return 0

    return fill_random
