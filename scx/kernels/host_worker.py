"""The host's half of the trip: threads of compiled code that serve the flags.

`scx.kernels.exchange` has the other half. A worker polls the bell, and when it
rings for a hop, claims one chunk of it after another: it waits for the rows that
it needs, encodes or decodes, and raises the chunk's flag. So a worker whose core
was taken from it delays one chunk only. A worker holds no GIL and no lock. It
spins for a while after its last work and then naps.

Rows are shuffled within groups of GROUP_ROWS, so that the first rows of a long
prefill can go back before the last have arrived; a step of up to that many
tokens is one group. The random words of a layer's next permutation are drawn
by worker 0 while the accelerator is busy elsewhere; each worker turns the same
words into the same permutation, and each word is used once. Worker 0 serves the
first chunk of each hop, so that no hop ends before it has seen to the words.
"""

import ctypes
import functools
import platform
import time
from collections.abc import Callable
from typing import Any

import numba
import numpy as np
import torch
from llvmlite import ir
from numba import int64, intp
from numba.core import cgutils
from numba.core.typing import signature
from numba.extending import intrinsic

from scx.kernels.compiled import element_of
from scx.kernels.host import host_kernels
from scx.kernels.protocol import (
    CHUNK_BITS,
    FLAG_BYTES,
    GROUP_ROWS,
    HOP_BITS,
    TOKEN_BITS,
)

_I64 = ir.IntType(64)

ENCODE_ROWS, ENCODE_FEATURES, DECODE_FEATURES = range(3)

# Columns of the table of hops.
HOP_KIND, HOP_LAYER, HOP_WIDTH = range(3)
# Columns of the counters, one row a layer. The time is in nanoseconds.
COUNT_STEPS, COUNT_CROSSINGS, COUNT_BYTES_IN, COUNT_BYTES_OUT, COUNT_TIME = range(5)

_TOKEN_MASK = (1 << TOKEN_BITS) - 1
_CHUNK_MASK = (1 << CHUNK_BITS) - 1
_HOP_MASK = (1 << HOP_BITS) - 1
_CLAIM_MASK = (1 << 32) - 1

# About 40 ns a spin: 20 ms, more than the gap between two decode steps.
_SPINS = 500_000
# Short naps while an engine may be between two layers of a long step; long ones once
# it has been idle for about a second, so that it leaves the cores alone.
_SHORT_NAP_MICROSECONDS, _LONG_NAP_MICROSECONDS = 50, 1000
_SHORT_NAPS = 10_000


def _load_acquire_code(typing_context, address):
    def emit(context, builder, signature, arguments):
        pointer = builder.inttoptr(arguments[0], _I64.as_pointer())
        return builder.load_atomic(pointer, "acquire", 8)

    return signature(int64, intp), emit


def _store_release_code(typing_context, address, value):
    def emit(context, builder, signature, arguments):
        pointer = builder.inttoptr(arguments[0], _I64.as_pointer())
        builder.store_atomic(arguments[1], pointer, "release", 8)
        return arguments[1]

    return signature(int64, intp, int64), emit


def _compare_exchange_code(typing_context, address, expected, value):
    """1 where the word at an address was as expected and now has the value, else 0."""

    def emit(context, builder, signature, arguments):
        pointer = builder.inttoptr(arguments[0], _I64.as_pointer())
        order = ("acq_rel", "acquire")
        result = builder.cmpxchg(pointer, arguments[1], arguments[2], *order)
        return builder.zext(builder.extract_value(result, 1), _I64)

    return signature(int64, intp, int64, int64), emit


def _relax_code(typing_context):
    """Tell an x86 core that this is a spin loop; others have no need of it."""

    def emit(context, builder, signature, arguments):
        if platform.machine() in ("x86_64", "AMD64"):
            kind = ir.FunctionType(ir.VoidType(), [])
            name = "llvm.x86.sse2.pause"
            builder.call(cgutils.get_or_insert_function(builder.module, kind, name), [])
        return _I64(0)

    return signature(int64), emit


# Their Python signature is not the one that compiled code calls.
_load_acquire: Any = intrinsic(_load_acquire_code)
_store_release: Any = intrinsic(_store_release_code)
_compare_exchange: Any = intrinsic(_compare_exchange_code)
_relax: Any = intrinsic(_relax_code)


def _libc(name: str, *arguments: Any) -> Callable:
    """A function of the C library that takes `arguments` and returns an int."""
    function = ctypes.CDLL(None)[name]
    function.argtypes = arguments
    function.restype = ctypes.c_int
    return function


@functools.cache
def worker_loop(dtype: torch.dtype, codec: str) -> Callable:
    """The compiled loop of one worker for rows of `dtype` and a codec of features. It
    returns 0 when it is told to stop and 1 where the operating system gave no
    randomness."""
    kernels = host_kernels(dtype, codec)
    encode_rows, encode_features = kernels.encode_rows, kernels.encode_features
    decode_features, fill_random = kernels.decode_features, kernels.fill_random
    draw_permutation = kernels.draw_permutation
    usleep = _libc("usleep", ctypes.c_uint)
    clock_gettime = _libc("clock_gettime", ctypes.c_int, ctypes.c_void_p)
    clock = time.CLOCK_MONOTONIC
    element = element_of(dtype)
    # One more axis, for the layers.
    keys = kernels.key.replace("[", "[:, ")

    @numba.njit(nogil=True, error_model="numpy")
    def nanoseconds(moment):
        # A struct timespec of two 64-bit integers.
        clock_gettime(clock, moment.ctypes)
        return 1_000_000_000 * moment[0] + moment[1]

    @numba.njit(nogil=True, error_model="numpy")
    def wait_for(address, value):
        while _load_acquire(address) < value:
            _relax()

    @numba.njit(nogil=True, error_model="numpy")
    def wait_for_chunks(ready, first, last, turn):
        for chunk in range(first, last):
            while _load_acquire(ready + FLAG_BYTES * chunk) != turn:
                _relax()

    @numba.njit(nogil=True, error_model="numpy")
    def claim(claims, turn, chunks):
        """The next chunk of a turn that nobody has; `chunks` where none is left."""
        while True:
            word = _load_acquire(claims)
            if word >> 32 > turn:
                return chunks
            # Worker 0 has chunk 0.
            chunk = word & _CLAIM_MASK if word >> 32 == turn else 1
            if chunk >= chunks:
                return chunks
            if _compare_exchange(claims, word, (turn << 32) | (chunk + 1)) == 1:
                return chunk

    @numba.njit(
        "intp(intp, intp, intp, intp, intp, intp, intp, "
        f"{element}[::1], {element}[::1], int64[::1], int64[:, ::1], {keys}, {keys}, "
        "float32[:, ::1], intp, boolean, uint64[:, ::1], int64[::1], int64[:, ::1])",
        nogil=True,
        error_model="numpy",
    )
    def serve(
        worker,
        stop,
        bell,
        claims,
        ready,
        done,
        words_left_address,
        inbox,
        outbox,
        positions,
        hops,
        encoding_keys,
        decoding_keys,
        cos_sin,
        num_heads,
        is_neox_style,
        words,
        words_left,
        counters,
    ):
        pi = np.empty(GROUP_ROWS, np.int32)
        rank = np.empty(GROUP_ROWS, np.int32)
        moment = np.empty(2, np.int64)
        heard = np.int64(0)
        spins = naps = 0
        while True:
            ringing = _load_acquire(bell)
            if ringing == heard:
                if _load_acquire(stop) != 0:
                    return 0
                spins += 1
                if spins < _SPINS:
                    _relax()
                elif naps < _SHORT_NAPS:
                    usleep(_SHORT_NAP_MICROSECONDS)
                    naps += 1
                else:
                    usleep(_LONG_NAP_MICROSECONDS)
                continue
            heard, naps = ringing, 0
            turn = ringing >> 32
            tokens = ringing & _TOKEN_MASK
            rows = 1 << ((ringing >> TOKEN_BITS) & _CHUNK_MASK)
            hop = (ringing >> (TOKEN_BITS + CHUNK_BITS)) & _HOP_MASK
            kind, layer = hops[hop, HOP_KIND], hops[hop, HOP_LAYER]
            width = hops[hop, HOP_WIDTH]
            chunks = (tokens + rows - 1) // rows
            fresh = words_left_address + 8 * layer
            start = nanoseconds(moment)
            if worker == 0:
                counters[layer, COUNT_STEPS] += kind == ENCODE_ROWS
                counters[layer, COUNT_CROSSINGS] += 2
                counters[layer, COUNT_BYTES_IN] += tokens * width * inbox.itemsize
                counters[layer, COUNT_BYTES_OUT] += tokens * width * inbox.itemsize
                if kind == ENCODE_FEATURES:
                    counters[layer, COUNT_BYTES_IN] += tokens * positions.itemsize
                if kind == ENCODE_ROWS and words_left[layer] < tokens:
                    if fill_random(words[layer, words_left[layer] : tokens]) != 0:
                        return 1
                    _store_release(fresh, tokens)
                elif kind == DECODE_FEATURES:
                    # Before this worker's first flag of the hop, so before any
                    # later hop, in which the old words would count as fresh.
                    _store_release(fresh, 0)
            drawn = -1
            source = inbox[: tokens * width].reshape(tokens, width)
            target = outbox[: tokens * width].reshape(tokens, width)
            chunk = np.int64(0) if worker == 0 else claim(claims, turn, chunks)
            while chunk < chunks:
                # A worker that finds nothing to do goes on to its nap.
                spins = 0
                first = chunk * rows
                last = min(first + rows, tokens)
                if kind == DECODE_FEATURES:
                    wait_for_chunks(ready, chunk, chunk + 1, turn)
                    decode_features(source, target, decoding_keys[layer], first, last)
                else:
                    group = first // GROUP_ROWS
                    begin = group * GROUP_ROWS
                    end = min(begin + GROUP_ROWS, tokens)
                    if drawn != group:
                        wait_for(fresh, tokens)
                        size = end - begin
                        draw_permutation(words[layer, begin:end], pi[:size], rank[:size])
                        drawn = group
                    wait_for_chunks(ready, begin // rows, (end + rows - 1) // rows, turn)
                    if kind == ENCODE_ROWS:
                        encode_rows(
                            source[begin:end],
                            target[begin:end],
                            pi,
                            first - begin,
                            last - begin,
                        )
                    else:
                        encode_features(
                            source[begin:end],
                            target[begin:end],
                            rank,
                            positions[begin:end],
                            cos_sin,
                            encoding_keys[layer],
                            num_heads,
                            is_neox_style,
                            first - begin,
                            last - begin,
                        )
                _store_release(done + FLAG_BYTES * chunk, turn)
                chunk = claim(claims, turn, chunks)
            if worker == 0:
                counters[layer, COUNT_TIME] += nanoseconds(moment) - start
                if kind == DECODE_FEATURES:
                    if fill_random(words[layer, :tokens]) != 0:
                        return 1
                    _store_release(fresh, tokens)

    return serve
