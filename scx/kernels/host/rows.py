"""Row shuffles on the host's cores, and the random orders that they follow."""

import ctypes
import functools
from collections.abc import Callable

import numpy as np
import torch
from numba import int32, intp, uint64, void

from scx.errors import SCXUnsupportedError
from scx.kernels.host.compiled import array, element_of, helper, kernel
from scx.kernels.host.llvm import prefetch


@helper
def prefetch_row(row):
    """Fetch a row ahead. Shuffled rows defeat the hardware's own prefetcher."""
    for start in range(0, row.nbytes, 64):
        prefetch(row.ctypes.data + start)


@functools.cache
def encode_rows_kernel(dtype: torch.dtype) -> Callable:
    rows, order = array(element_of(dtype), 2), array(int32, 1)

    @kernel(void(rows, rows, order, intp, intp))
    def encode_rows(src, dst, pi, first, last):
        """Row i of `dst` (T, columns) becomes row pi[i] of `src` (T, columns)."""
        # In all kernels: numba adds no case for a negative index if indices are
        # unsigned, and only then does LLVM vectorise.
        for i in range(np.uintp(first), np.uintp(last)):
            row = np.uintp(pi[i])
            for column in range(np.uintp(dst.shape[1])):
                dst[i, column] = src[row, column]

    return encode_rows


@helper
def _high_product(word, count):
    """The high 64 bits of a product of two uint64, if `count` is below 2^32."""
    half, low_bits = np.uint64(32), np.uint64(0xFFFFFFFF)
    carry = ((word & low_bits) * count) >> half
    return ((word >> half) * count + carry) >> half


@functools.cache
def draw_permutation_kernel() -> Callable:
    @kernel(void(array(uint64, 1), array(int32, 1), array(int32, 1)))
    def draw_permutation(words, pi, rank):
        """Fill `pi` (n,) with a permutation and `rank` (n,) with its inverse.

        A Fisher-Yates shuffle by the random `words` (n,). A draw from i + 1 values
        gives each of them a probability within 2^-64 of 1 / (i + 1). So all n draws
        together are less than n^2 / 2^65 from uniform in total variation: 2^-37 for
        2^14 rows.
        """
        for i in range(pi.size):
            j = np.intp(_high_product(words[i], np.uint64(i + 1)))
            pi[i] = pi[j]
            pi[j] = i
        for i in range(pi.size):
            rank[pi[i]] = i

    return draw_permutation


def libc_getrandom() -> Callable:
    """The C library's getrandom. Raises SCXUnsupportedError if it has none."""
    try:
        getrandom = ctypes.CDLL(None).getrandom
    except AttributeError:
        raise SCXUnsupportedError(
            "This system's C library has no getrandom; the host kernels need Linux "
            "with glibc 2.25 or newer, or musl"
        ) from None
    # The address is an integer, which compiled code can advance.
    getrandom.argtypes = (ctypes.c_size_t, ctypes.c_size_t, ctypes.c_uint)
    getrandom.restype = ctypes.c_ssize_t
    return getrandom


def fill_random_kernel(getrandom: Callable) -> Callable:
    @kernel(intp(array(uint64, 1)))
    def fill_random(words):
        """Fill `words` (n,) from getrandom(2). Returns 0, or 1 if it failed.

        After a 1 the words are not random, and the caller must stop.
        """
        address, left = words.ctypes.data, words.nbytes
        while left > 0:
            granted = getrandom(address, left, 0)
            if granted < 0:
                # A signal can interrupt a long request, but none of up to 256 bytes.
                granted = getrandom(address, min(left, 256), 0)
            if granted <= 0:
                return 1
            address += granted
            left -= granted
        return 0

    return fill_random
