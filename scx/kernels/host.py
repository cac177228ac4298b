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
from typing import Any, NamedTuple

import numba
import numpy as np
import torch
from llvmlite import ir
from numba import float32, int64, intp, uint16
from numba.core import cgutils
from numba.core.typing import Signature, signature
from numba.extending import intrinsic

from scx.errors import SCXUnsupportedError
from scx.kernels import avx512
from scx.kernels.converters import CONVERTERS

_PREFETCH = "llvm.prefetch.p0i8"

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
    return HostKernels(
        encode_rows=_encode_rows(element_of(dtype)),
        encode_features=_encode_features(dtype),
        decode_features=_decode_features(dtype),
        draw_permutation=_draw_permutation(),
        fill_random=_fill_random(_libc_getrandom()),
    )


def _converter(types: Signature, emit: Callable) -> Callable:
    """A function of one value for compiled code; `emit` builds its LLVM code."""

    @intrinsic
    def convert(typing_context, value):
        return types, lambda context, builder, types, values: emit(builder, *values)

    return convert


@functools.cache
def _converters(dtype: torch.dtype) -> tuple[Callable, Callable]:
    """Functions of one element that widen it to float32 and narrow it again."""
    if dtype == torch.float32:
        same = _converter(signature(float32, float32), lambda builder, value: value)
        return same, same
    widen, narrow = CONVERTERS[dtype]
    to_float, to_bits = signature(float32, uint16), signature(uint16, float32)
    return _converter(to_float, widen), _converter(to_bits, narrow)


def _prefetch_code(typing_context, address):
    """Have the cache line at an address on its way into the core's caches."""

    def emit(context, builder, signature, arguments):
        byte, flag = ir.IntType(8).as_pointer(), ir.IntType(32)
        kind = ir.FunctionType(ir.VoidType(), [byte, flag, flag, flag])
        prefetch = cgutils.get_or_insert_function(builder.module, kind, _PREFETCH)
        # To be read, used soon, data.
        hints = [ir.Constant(flag, hint) for hint in (0, 3, 1)]
        builder.call(prefetch, [builder.inttoptr(arguments[0], byte), *hints])
        return ir.Constant(ir.IntType(64), 0)

    return signature(int64, intp), emit


_prefetch: Any = intrinsic(_prefetch_code)


@_helper
def _prefetch_row(row):
    """Rows come in no order, which the hardware's own prefetcher cannot foresee."""
    for start in range(0, row.nbytes, 64):
        _prefetch(row.ctypes.data + start)


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
def _decode_features(dtype: torch.dtype) -> Callable:
    element = element_of(dtype)
    permute_heads = _permute_heads(dtype)

    @_kernel(f"void({element}[:, ::1], {element}[:, ::1], uint16[:, ::1], intp, intp)")
    def decode_features(src, dst, inverse_key, first, last):
        """Feature d of a head in `dst` becomes its feature inverse_key[m, d] in `src`.

        `src` and `dst` are (T, N x D), `inverse_key` is uint16 (M, D).
        """
        for j in range(first, last):
            permute_heads(src[j], dst[j], inverse_key)

    return decode_features


def element_of(dtype: torch.dtype) -> str:
    """numba's name of an element."""
    return "float32" if dtype == torch.float32 else "uint16"


def _has_registers(dtype: torch.dtype) -> bool:
    """Whether `scx.kernels.avx512` can be used for some sizes of a head."""
    return dtype != torch.float32 and avx512.is_available()


@functools.cache
def _heads_in_registers(head_dim: int, rotated: torch.dtype | None) -> Callable:
    one_head = avx512.head_function(head_dim, rotated)

    @_helper
    def heads_in_registers(src, dst, key, cos_sin):
        """The function for each of one row's heads."""
        kv_heads = key.shape[0]
        group, size = dst.size // key.size, 2 * head_dim
        source, target = src.ctypes.data, dst.ctypes.data
        for m in range(kv_heads):
            entry = key.ctypes.data + m * size
            for start in range(m * group * size, (m + 1) * group * size, size):
                one_head(source + start, target + start, entry, cos_sin)

    return heads_in_registers


@functools.cache
def _permute_heads(dtype: torch.dtype) -> Callable:
    @_helper
    def permute_head(src, dst, key):
        for d in range(np.uintp(key.size)):
            dst[d] = src[np.uintp(key[d])]

    @_helper
    def permute_heads(src, dst, key):
        """One row's heads, which may be queries or keys or values: (heads x D)."""
        kv_heads, head_dim = key.shape
        group_columns = src.size // kv_heads
        for m in range(kv_heads):
            for start in range(m * group_columns, (m + 1) * group_columns, head_dim):
                end = start + head_dim
                permute_head(src[start:end], dst[start:end], key[m])

    if not _has_registers(dtype):
        return permute_heads
    permute_64, permute_128 = (
        _heads_in_registers(64, None),
        _heads_in_registers(128, None),
    )

    @_helper
    def permute_heads_avx512(src, dst, key):
        if key.shape[1] == 64:
            permute_64(src, dst, key, 0)
        elif key.shape[1] == 128:
            permute_128(src, dst, key, 0)
        else:
            permute_heads(src, dst, key)

    return permute_heads_avx512


@functools.cache
def _turn_heads(dtype: torch.dtype) -> Callable:
    permute_heads = _permute_heads(dtype)
    widen, narrow = _converters(dtype)

    @_helper
    def turn_heads(src, dst, key, cos_sin, is_neox_style, rotated):
        """Rotate and permute one row's heads, queries or keys, by one position's angles.

        `rotated` is scratch memory of their size or more.
        """
        rotary_dim, head_dim = np.uintp(cos_sin.size), key.shape[1]
        half = rotary_dim // np.uintp(2)
        for start in range(0, dst.size, head_dim):
            head = src[start : start + head_dim]
            turned = rotated[start : start + head_dim]
            # Two loops, as a stride known only at run time would not vectorise.
            if is_neox_style:
                for i in range(half):
                    a, b = widen(head[i]), widen(head[i + half])
                    cos, sin = cos_sin[i], cos_sin[i + half]
                    turned[i] = narrow(a * cos - b * sin)
                    turned[i + half] = narrow(b * cos + a * sin)
            else:
                for i in range(half):
                    even = np.uintp(2) * i
                    odd = even + np.uintp(1)
                    a, b = widen(head[even]), widen(head[odd])
                    cos, sin = cos_sin[i], cos_sin[i + half]
                    turned[even] = narrow(a * cos - b * sin)
                    turned[odd] = narrow(b * cos + a * sin)
            for i in range(rotary_dim, np.uintp(head_dim)):
                turned[i] = head[i]
        permute_heads(rotated[: dst.size], dst, key)

    if not _has_registers(dtype):
        return turn_heads
    turn_64 = _heads_in_registers(64, dtype)
    turn_128 = _heads_in_registers(128, dtype)

    @_helper
    def turn_heads_avx512(src, dst, key, cos_sin, is_neox_style, rotated):
        all_turn = is_neox_style and cos_sin.size == key.shape[1]
        if all_turn and key.shape[1] == 64:
            turn_64(src, dst, key, cos_sin.ctypes.data)
        elif all_turn and key.shape[1] == 128:
            turn_128(src, dst, key, cos_sin.ctypes.data)
        else:
            turn_heads(src, dst, key, cos_sin, is_neox_style, rotated)

    return turn_heads_avx512


@functools.cache
def _encode_features(dtype: torch.dtype) -> Callable:
    element = element_of(dtype)
    permute_heads, turn_heads = _permute_heads(dtype), _turn_heads(dtype)

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
        rotated = np.empty(queries, src.dtype)
        for j in range(first, last):
            if j + 1 < last:
                _prefetch_row(src[rank[j + 1]])
            row, encoded, angles = src[rank[j]], dst[j], cos_sin[positions[j]]
            turn_heads(
                row[:queries], encoded[:queries], key, angles, is_neox_style, rotated
            )
            turn_heads(
                row[queries:turning],
                encoded[queries:turning],
                key,
                angles,
                is_neox_style,
                rotated,
            )
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
