"""The host's half of the trip: threads of compiled code that serve the flags.

`kernels.cuda.exchange` has the other half. Worker 0 leads: it sees a trip begin, checks
what the accelerator asks for, draws the random words of the step's row order, and
announces the trip to the others. Then every worker claims one chunk after another: it
waits for the rows that it needs, encodes or decodes, and raises the chunk's flag. So a
worker whose core was taken from it delays one chunk only. Workers hold no GIL and no
lock. They spin for a while after their last work and then nap.

Who writes and who reads each shared word:

    word     written by        read by      why that order is safe
    request  accelerator       worker 0     read once, checked, copied to `trip`
    ready    accelerator       all workers  released after the chunk's rows and positions;
                                            the first chunk's also after `request`
    done     all workers       accelerator  released after the chunk's answer
    TURN     worker 0          the others   released after `trip`, the words and CLAIMS
    CLAIMS   all workers       all workers  compare-exchange; it holds the turn, so that a
                                            late worker cannot claim in another trip
    served   its own worker    worker 0     released after the chunk; a trip is announced
                                            when all chunks of the last one are served
    STOP     any thread        all workers  ends every wait
    STATUS   first that fails  all workers  compare-exchange from OK; ends every wait

The first three lie in memory that the accelerator can write at any time. It is not
trusted: what comes from there is only compared, or checked after it was read once, or
copied as data. The rest is this process's own.

Rows are shuffled within groups of about GROUP_ROWS, so that the first rows of a long
prefill can go back before the last have arrived. Each worker turns the same words into
the same permutation, and each word is used once: a step that was abandoned takes its
words with it. Those of a layer's next step are drawn while the accelerator is busy
elsewhere.
"""

import ctypes
import functools
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import numba
import numpy as np
import torch

from scx.kernels.host.compiled import helper, libc, spin
from scx.kernels.host.llvm import (
    compare_exchange,
    load_acquire,
    load_once,
    store_release,
)
from scx.kernels.host.table import host_kernels
from scx.kernels.protocol import (
    FLAG_STRIDE,
    FORSAKEN,
    GROUP_ROWS,
    ROWS_BITS,
    chunk_rows_of,
    group_of,
)

ENCODE_ROWS, ENCODE_FEATURES, DECODE_FEATURES = range(3)

# What a worker's loop returns, and the values of STATUS.
OK, NO_RANDOMNESS, CUT_OFF, BAD_REQUEST = range(4)
# Of a wait that ends because its worker is to stop.
_ENDED = -1

# Words of `control`, a cache line each.
STOP, STATUS, TURN, CLAIMS, BUSY_SINCE, BUSY_HOP = range(0, 6 * FLAG_STRIDE, FLAG_STRIDE)
CONTROL_WORDS = 6 * FLAG_STRIDE
# Columns of the table of hops.
HOP_KIND, HOP_LAYER, HOP_WIDTH = range(3)
# Columns of `trip`.
TRIP_HOP, TRIP_TOKENS, TRIP_CHUNKS = range(3)
# Columns of `orders`, one row per layer: fresh words, and rows of the step on its way.
FRESH, SENT = range(2)
# Columns of the counters, one row per layer. The time is in nanoseconds.
COUNT_STEPS, COUNT_CROSSINGS, COUNT_BYTES_IN, COUNT_BYTES_OUT, COUNT_TIME = range(5)

# CLAIMS holds the low bits of the turn above these, and the chunks that are left.
_CLAIM_BITS = 32
_CLAIM_MASK = (1 << _CLAIM_BITS) - 1
_ROWS_MASK = (1 << ROWS_BITS) - 1

# About 40 ns per spin: 20 ms, more than the gap between two decode steps.
_SPINS = 500_000
# Short naps while an engine may be between two layers of a long step; long ones once
# it has been idle for about a second, so that it leaves the cores alone.
_SHORT_NAP_MICROSECONDS, _LONG_NAP_MICROSECONDS = 50, 1000
_SHORT_NAPS = 10_000


class Shared(NamedTuple):
    """The arrays of a Mailbox, which the accelerator maps."""

    inbox: Any
    outbox: Any
    positions: Any
    ready: Any
    done: Any
    request: Any


class Private(NamedTuple):
    """This process's own memory."""

    control: Any
    """int64 (CONTROL_WORDS,)"""
    served: Any
    """int64 (workers, FLAG_STRIDE): in the first column, chunks that each has served."""
    trip: Any
    """int64 (3,): the trip that worker 0 announced."""
    hops: Any
    """int64 (hops, 3): kind, layer and width."""
    orders: Any
    """int64 (layers, 2): FRESH and SENT, worker 0's alone."""
    words: Any
    """uint64 (layers, max_tokens): the random words of each layer's row order."""
    encoding_keys: Any
    """(layers, ...), as the codec's kernels take one layer's."""
    decoding_keys: Any
    """Likewise."""
    cos_sin: Any
    """float32 (max_position, R)"""
    counters: Any
    """int64 (layers, 5)"""
    num_heads: int
    is_neox_style: bool
    patience: int
    """Short naps that a worker waits for a chunk at most."""


_chunk_rows_of: Any = helper(chunk_rows_of)
_group_of: Any = helper(group_of)


@helper
def _address(words, index):
    return words.ctypes.data + 8 * index


@helper
def _ends(own):
    """Whether this worker is to stop."""
    control = own.control
    return (
        load_acquire(_address(control, STOP)) != 0
        or load_acquire(_address(control, STATUS)) != OK
    )


@helper
def _claim(own, turn):
    """The next chunk of a turn that nobody has, or -1 if none is left."""
    address = _address(own.control, CLAIMS)
    while True:
        word = load_acquire(address)
        left = word & _CLAIM_MASK
        if word >> _CLAIM_BITS != (turn << _CLAIM_BITS) >> _CLAIM_BITS or left == 0:
            return -1
        if compare_exchange(address, word, word - 1) == 1:
            # Only now, as the trip cannot change before this chunk is served.
            return own.trip[TRIP_CHUNKS] - left


@functools.cache
def _waits() -> tuple[Callable, Callable, Callable]:
    """Compiled functions that wait: for rows, for the other workers, for a trip."""
    usleep = libc("usleep", ctypes.c_uint)

    @helper
    def wait_for_rows(shared, own, first, last, turn):
        """Wait for chunks [first, last): OK once all are there, _ENDED if this worker is
        to stop, CUT_OFF if they do not come."""
        for chunk in range(first, last):
            flag = _address(shared.ready, FLAG_STRIDE * chunk)
            spins = naps = 0
            while load_acquire(flag) != turn:
                if _ends(own):
                    return _ENDED
                if spins < _SPINS:
                    spin(spins)
                    spins += 1
                elif naps < own.patience:
                    usleep(_SHORT_NAP_MICROSECONDS)
                    naps += 1
                else:
                    return CUT_OFF
        return OK

    @helper
    def wait_for_workers(own, chunks):
        """Wait until `chunks` chunks are served in all: OK, or _ENDED."""
        spins = 0
        while not _ends(own):
            served = 0
            for worker in range(len(own.served)):
                served += load_acquire(_address(own.served, FLAG_STRIDE * worker))
            if served == chunks:
                return OK
            spin(spins)
            spins += 1
        return _ENDED

    @helper
    def wait_for_trip(flag, last, own, idle):
        """OK and the turn at address `flag` once it is not the `last` one, or _ENDED.

        `idle`, int64 (2,), counts what this worker waited: spins since it last had work,
        naps since the last trip.
        """
        while True:
            turn = load_acquire(flag)
            if turn != last:
                idle[1] = 0
                return OK, turn
            if _ends(own):
                return _ENDED, last
            if idle[0] < _SPINS:
                spin(idle[0])
                idle[0] += 1
            elif idle[1] < _SHORT_NAPS:
                usleep(_SHORT_NAP_MICROSECONDS)
                idle[1] += 1
            else:
                usleep(_LONG_NAP_MICROSECONDS)

    return wait_for_rows, wait_for_workers, wait_for_trip


@functools.cache
def _clock() -> Callable:
    clock_gettime = libc("clock_gettime", ctypes.c_int, ctypes.c_void_p)
    clock = time.CLOCK_MONOTONIC

    @helper
    def nanoseconds(moment):
        """The time, by way of `moment`, int64 (2,): a struct timespec."""
        clock_gettime(clock, moment.ctypes)
        return 1_000_000_000 * moment[0] + moment[1]

    return nanoseconds


@functools.cache
def _leading(dtype: torch.dtype, codec: str) -> tuple[Callable, Callable]:
    """What worker 0 does beside its chunks: accept a trip, and draw ahead after it."""
    fill_random = host_kernels(dtype, codec).fill_random

    @helper
    def accept(shared, own, turn):
        """Check what the accelerator asks for, draw the words of a new row order, and
        announce the trip: OK, BAD_REQUEST or NO_RANDOMNESS."""
        request = load_once(_address(shared.request, 0))
        hop, tokens = request >> ROWS_BITS, request & _ROWS_MASK
        if hop < 0 or hop >= len(own.hops) or tokens < 1 or tokens > own.words.shape[1]:
            return BAD_REQUEST
        store_release(_address(own.control, BUSY_HOP), hop)
        kind, layer = own.hops[hop, HOP_KIND], own.hops[hop, HOP_LAYER]
        order = own.orders[layer]
        if kind == ENCODE_ROWS:
            fresh = min(order[FRESH], tokens)
            order[FRESH] = order[SENT] = 0
            if fill_random(own.words[layer, fresh:tokens]) != 0:
                return NO_RANDOMNESS
            order[SENT] = tokens
        elif kind == ENCODE_FEATURES:
            # In the order of rows that were sent, and once.
            if order[SENT] != tokens:
                return BAD_REQUEST
            order[SENT] = 0
        size = tokens * own.hops[hop, HOP_WIDTH] * shared.inbox.itemsize
        counters = own.counters[layer]
        counters[COUNT_STEPS] += kind == ENCODE_ROWS
        counters[COUNT_CROSSINGS] += 2
        counters[COUNT_BYTES_IN] += size
        counters[COUNT_BYTES_OUT] += size
        if kind == ENCODE_FEATURES:
            counters[COUNT_BYTES_IN] += tokens * shared.positions.itemsize
        rows = _chunk_rows_of(tokens)
        chunks = (tokens + rows - 1) // rows
        own.trip[TRIP_HOP], own.trip[TRIP_TOKENS] = hop, tokens
        own.trip[TRIP_CHUNKS] = chunks
        # Chunk 0 is worker 0's own.
        claims = (turn << _CLAIM_BITS) | (chunks - 1)
        store_release(_address(own.control, CLAIMS), claims)
        store_release(_address(own.control, TURN), turn)
        return OK

    @helper
    def draw_ahead(own, layer, tokens):
        """Draw the words of a layer's next step, as long as this one was: OK or
        NO_RANDOMNESS."""
        order = own.orders[layer]
        order[FRESH] = order[SENT] = 0
        if fill_random(own.words[layer, :tokens]) != 0:
            return NO_RANDOMNESS
        order[FRESH] = tokens
        return OK

    return accept, draw_ahead


class _Trip(NamedTuple):
    turn: Any
    kind: Any
    layer: Any
    width: Any
    tokens: Any
    chunk_rows: Any


class _Order(NamedTuple):
    """A worker's own: the row order of one group."""

    pi: Any
    rank: Any
    begin: Any
    """int64 (1,): the first row of the group that was drawn last, or -1."""


@functools.cache
def _chunk_server(dtype: torch.dtype, codec: str) -> Callable:
    """A compiled function that serves one chunk of a trip, by the kind of its hop."""
    kernels = host_kernels(dtype, codec)
    encode_rows, encode_features = kernels.encode_rows, kernels.encode_features
    decode_features, draw_permutation = kernels.decode_features, kernels.draw_permutation
    wait_for_rows, _, _ = _waits()

    @helper
    def rows_of(flat, trip):
        return flat[: trip.tokens * trip.width].reshape(trip.tokens, trip.width)

    @helper
    def wait_for_group(shared, own, trip, order, begin, end):
        """Draw the order of rows [begin, end) and wait for all of them."""
        if order.begin[0] != begin:
            pi, rank = order.pi[: end - begin], order.rank[: end - begin]
            draw_permutation(own.words[trip.layer, begin:end], pi, rank)
            order.begin[0] = begin
        last = (end + trip.chunk_rows - 1) // trip.chunk_rows
        return wait_for_rows(shared, own, begin // trip.chunk_rows, last, trip.turn)

    @helper
    def serve_chunk(shared, own, trip, order, chunk):
        """Answer a chunk and raise its flag: OK, or why it is not answered."""
        first = chunk * trip.chunk_rows
        last = min(first + trip.chunk_rows, trip.tokens)
        source, target = rows_of(shared.inbox, trip), rows_of(shared.outbox, trip)
        begin, end = first, last
        if trip.kind == DECODE_FEATURES:
            status = wait_for_rows(shared, own, chunk, chunk + 1, trip.turn)
        else:
            begin, end = _group_of(first, trip.tokens)
            status = wait_for_group(shared, own, trip, order, begin, end)
        if status != OK:
            return status
        source, target = source[begin:end], target[begin:end]
        first, last = first - begin, last - begin
        if trip.kind == ENCODE_ROWS:
            encode_rows(source, target, order.pi, first, last)
        elif trip.kind == ENCODE_FEATURES:
            encode_features(
                source,
                target,
                order.rank,
                shared.positions[begin:end],
                own.cos_sin,
                own.encoding_keys[trip.layer],
                own.num_heads,
                own.is_neox_style,
                first,
                last,
            )
        else:
            decode_features(source, target, own.decoding_keys[trip.layer], first, last)
        store_release(_address(shared.done, FLAG_STRIDE * chunk), trip.turn)
        return OK

    return serve_chunk


@functools.cache
def worker_loop(dtype: torch.dtype, codec: str) -> Any:
    """serve(worker, shared, own), the loop of one worker for rows of `dtype` and a codec
    of features.

    `worker` is an intp, `shared` a Shared and `own` a Private. Returns OK when it is told
    to stop, also by another worker's failure, and else why this worker ended the loop of
    all: NO_RANDOMNESS if the operating system gave none, CUT_OFF if rows that were
    announced did not come, BAD_REQUEST if the accelerator asked for what it may not.
    """
    _, wait_for_workers, wait_for_trip = _waits()
    accept, draw_ahead = _leading(dtype, codec)
    serve_chunk, nanoseconds = _chunk_server(dtype, codec), _clock()

    @helper
    def serve_trips(worker, shared, own):
        control, leads = own.control, worker == 0
        flag = _address(shared.ready, 0) if leads else _address(control, TURN)
        own_served = _address(own.served, FLAG_STRIDE * worker)
        pi = np.empty(2 * GROUP_ROWS, np.int32)
        order = _Order(pi, np.empty_like(pi), np.empty(1, np.int64))
        moment, idle = np.empty(2, np.int64), np.zeros(2, np.int64)
        turn = served = announced = np.int64(0)
        start = np.int64(0)
        while True:
            status, turn = wait_for_trip(flag, turn, own, idle)
            if leads and status == OK:
                start = nanoseconds(moment)
                store_release(_address(control, BUSY_SINCE), start)
                status = wait_for_workers(own, announced)
                if status == OK:
                    status = accept(shared, own, turn)
                announced += own.trip[TRIP_CHUNKS]
            if status != OK:
                return status
            chunk = np.int64(0) if leads else _claim(own, turn)
            if chunk < 0:
                continue
            hop, tokens = own.hops[own.trip[TRIP_HOP]], own.trip[TRIP_TOKENS]
            kind, layer, width = hop[HOP_KIND], hop[HOP_LAYER], hop[HOP_WIDTH]
            trip = _Trip(turn, kind, layer, width, tokens, _chunk_rows_of(tokens))
            order.begin[0], idle[0] = -1, 0
            while chunk >= 0:
                status = serve_chunk(shared, own, trip, order, chunk)
                if status != OK:
                    return status
                served += 1
                store_release(own_served, served)
                chunk = _claim(own, turn)
            if leads:
                own.counters[layer, COUNT_TIME] += nanoseconds(moment) - start
                store_release(_address(control, BUSY_SINCE), 0)
                if kind == DECODE_FEATURES:
                    # Nobody reads the words of this layer before they are announced.
                    status = draw_ahead(own, layer, tokens)
                    if status != OK:
                        return status

    @numba.njit(nogil=True, error_model="numpy")
    def serve(worker, shared, own):
        status = serve_trips(worker, shared, own)
        if status == _ENDED:
            status = OK
        address = _address(own.control, STATUS)
        if status != OK and compare_exchange(address, OK, status) == 0:
            status = OK
        # Each worker does so after its last answer, so that none stays as it was.
        for flag in range(0, len(shared.done), FLAG_STRIDE):
            store_release(_address(shared.done, flag), FORSAKEN)
        return status

    return serve
