"""The host's half of a trip: threads of compiled code that serve the accelerator.

`scx.kernels.cuda.exchange` is the other half. Worker 0 leads: it sees a trip begin,
checks what the accelerator asks for, draws the random words of the step's row order, and
announces the trip to the others. Then every worker claims one chunk after another, waits
for the rows that the chunk needs, encodes or decodes it, and raises its flag. So a worker
that loses its core delays only one chunk. Workers hold no lock and not the GIL. How they
share memory is in `scx.kernels.host.memory`, how they wait in `scx.kernels.host.waiting`.

Rows are shuffled within groups of at most GROUP_ROWS, so that the first rows of a long
prefill can go back before the last have arrived. Every worker turns the same words into
the same permutation. Each word is used once: a step that is abandoned takes its words
with it. The words of a layer's next step are drawn while the accelerator is busy
elsewhere.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import numba
import numpy as np
import torch

from scx.kernels.host.compiled import inlined
from scx.kernels.host.llvm import (
    compare_exchange,
    load_acquire,
    load_once,
    store_release,
)
from scx.kernels.host.memory import (
    BAD_REQUEST,
    BUSY_HOP,
    BUSY_SINCE,
    CLAIMS,
    COUNT_BYTES_IN,
    COUNT_BYTES_OUT,
    COUNT_CROSSINGS,
    COUNT_STEPS,
    COUNT_TIME,
    DECODE_FEATURES,
    ENCODE_FEATURES,
    ENCODE_ROWS,
    FRESH,
    HOP_KIND,
    HOP_LAYER,
    HOP_WIDTH,
    NO_RANDOMNESS,
    OK,
    SENT,
    STATUS,
    TRIP_CHUNKS,
    TRIP_HOP,
    TRIP_TOKENS,
    TRIP_WORKERS,
    TURN,
    address,
    borrowed,
)
from scx.kernels.host.table import host_kernels
from scx.kernels.host.waiting import (
    ENDED,
    LEAD_SPINS,
    nanoseconds,
    wait_for_rows,
    wait_for_trip,
    wait_for_workers,
    wait_to_help,
    wake,
)
from scx.kernels.protocol import (
    FLAG_STRIDE,
    FORSAKEN,
    GROUP_ROWS,
    ROWS_BITS,
    chunk_rows_of,
    group_of,
)

# CLAIMS holds the low bits of the turn above these, and the number of chunks left.
_CLAIM_BITS = 32
_CLAIM_MASK = (1 << _CLAIM_BITS) - 1
_ROWS_MASK = (1 << ROWS_BITS) - 1

# One more worker helps per so many bytes, which take one worker about 9 us.
_BYTES_PER_WORKER = 48 * 1024

_chunk_rows_of: Any = inlined(chunk_rows_of)
_group_of: Any = inlined(group_of)


class _Trip(NamedTuple):
    turn: int
    kind: int
    layer: int
    tokens: int
    chunk_rows: int
    width: int


class _Order(NamedTuple):
    """A worker's own copy of the row order of one group."""

    pi: np.ndarray
    """int32 (GROUP_ROWS,)"""
    rank: np.ndarray
    """Its inverse."""
    begin: np.ndarray
    """int64 (1,): the first row of that group, or -1 if there is none."""


@inlined
def _claim(own, turn):
    """A chunk of this turn that no worker has, or -1 if none is left."""
    claims = address(own.control, CLAIMS)
    while True:
        word = load_acquire(claims)
        left = word & _CLAIM_MASK
        if word >> _CLAIM_BITS != (turn << _CLAIM_BITS) >> _CLAIM_BITS or left == 0:
            return -1
        if compare_exchange(claims, word, word - 1):
            # Read after the claim: the trip cannot change before this chunk is served.
            return own.trip[TRIP_CHUNKS] - left


@inlined
def _read_trip(own, turn):
    """The trip that worker 0 announced."""
    hop, tokens = own.hops[own.trip[TRIP_HOP]], own.trip[TRIP_TOKENS]
    return _Trip(
        turn,
        hop[HOP_KIND],
        hop[HOP_LAYER],
        tokens,
        _chunk_rows_of(tokens),
        hop[HOP_WIDTH],
    )


@functools.cache
def _leading(dtype: torch.dtype, features: str) -> tuple[Callable, Callable]:
    """What only worker 0 does: accept a trip, and draw ahead after it."""
    fill_random = host_kernels(dtype, features).fill_random

    @inlined
    def accept(shared, own, turn):
        """Check what the accelerator asks for, draw the words of a new row order, and
        announce the trip: OK, BAD_REQUEST or NO_RANDOMNESS."""
        request = load_once(address(shared.request, 0))
        hop, tokens = request >> ROWS_BITS, request & _ROWS_MASK
        if hop < 0 or hop >= len(own.hops) or tokens < 1 or tokens > own.words.shape[1]:
            return BAD_REQUEST
        store_release(address(own.control, BUSY_HOP), hop)
        kind, layer = own.hops[hop, HOP_KIND], own.hops[hop, HOP_LAYER]
        order = own.orders[layer]
        if kind == ENCODE_ROWS:
            fresh = min(order[FRESH], tokens)
            order[FRESH] = order[SENT] = 0
            if fill_random(own.words[layer, fresh:tokens]) != 0:
                return NO_RANDOMNESS
            order[SENT] = tokens
        elif kind == ENCODE_FEATURES:
            # Once, and in the order in which the rows were sent. A single row has one
            # order, and was not sent.
            if order[SENT] != tokens and tokens > 1:
                return BAD_REQUEST
            order[SENT] = 0
        size = tokens * own.hops[hop, HOP_WIDTH] * shared.inbox.itemsize
        counters = own.counters[layer]
        counters[COUNT_STEPS] += kind == ENCODE_FEATURES
        counters[COUNT_CROSSINGS] += 2
        counters[COUNT_BYTES_IN] += size
        counters[COUNT_BYTES_OUT] += size
        if kind == ENCODE_FEATURES:
            counters[COUNT_BYTES_IN] += tokens * shared.positions.itemsize
        rows = _chunk_rows_of(tokens)
        chunks = (tokens + rows - 1) // rows
        own.trip[TRIP_HOP], own.trip[TRIP_TOKENS] = hop, tokens
        own.trip[TRIP_CHUNKS] = chunks
        # Chunk 0 is worker 0's.
        claims = (turn << _CLAIM_BITS) | (chunks - 1)
        own.trip[TRIP_WORKERS] = min(len(own.served), 1 + size // _BYTES_PER_WORKER)
        store_release(address(own.control, CLAIMS), claims)
        store_release(address(own.control, TURN), turn)
        return OK

    @inlined
    def draw_ahead(own, layer, tokens):
        """Draw the words of a layer's next step, for as many rows as this one had: OK or
        NO_RANDOMNESS."""
        order = own.orders[layer]
        order[FRESH] = order[SENT] = 0
        if fill_random(own.words[layer, :tokens]) != 0:
            return NO_RANDOMNESS
        order[FRESH] = tokens
        return OK

    return accept, draw_ahead


@functools.cache
def _chunk_server(dtype: torch.dtype, features: str) -> Callable:
    """A compiled function that serves one chunk of a trip."""
    kernels = host_kernels(dtype, features)
    shuffle, draw_permutation = kernels.encode_rows, kernels.draw_permutation
    encode, decode = kernels.encode_features, kernels.decode_features

    @inlined
    def wait_for_group(shared, own, trip, order, begin, end):
        """Draw the order of the group of rows [begin, end), and wait for all of them."""
        if order.begin[0] != begin:
            pi, rank = order.pi[: end - begin], order.rank[: end - begin]
            draw_permutation(own.words[trip.layer, begin:end], pi, rank)
            order.begin[0] = begin
        chunks = (end + trip.chunk_rows - 1) // trip.chunk_rows
        return wait_for_rows(shared, own, begin // trip.chunk_rows, chunks, trip.turn)

    @inlined
    def staged(box, place, rows, trip):
        """A group's rows (rows, width), which begin at row `place`."""
        return box[place * trip.width : (place + rows) * trip.width].reshape(
            (rows, trip.width)
        )

    @inlined
    def serve_chunk(shared, own, trip, order, chunk):
        """Answer a chunk and raise its flag: OK, or why it is not answered."""
        first = chunk * trip.chunk_rows
        last = min(first + trip.chunk_rows, trip.tokens)
        begin, end, place = _group_of(first, trip.tokens)
        if trip.kind == DECODE_FEATURES:
            status = wait_for_rows(shared, own, chunk, chunk + 1, trip.turn)
        else:
            status = wait_for_group(shared, own, trip, order, begin, end)
        if status != OK:
            return status
        source = staged(shared.inbox, place, end - begin, trip)
        target = staged(shared.outbox, place, end - begin, trip)
        first, last = first - begin, last - begin
        if trip.kind == ENCODE_ROWS:
            shuffle(source, target, order.pi, first, last)
        elif trip.kind == ENCODE_FEATURES:
            table = own.rotary_rows[trip.layer]
            encode(
                source,
                target,
                order.rank,
                shared.positions[place : place + end - begin],
                own.cos_sin[table[0] : table[1]],
                own.encoding_keys[trip.layer],
                own.num_heads,
                own.is_neox_style,
                first,
                last,
            )
        else:
            decode(source, target, own.decoding_keys[trip.layer], first, last)
        store_release(address(shared.done, FLAG_STRIDE * chunk), trip.turn)
        return OK

    return serve_chunk


@functools.cache
def worker_loop(dtype: torch.dtype, features: str) -> Any:
    """serve(worker, shared, own): the loop of one worker, for rows of `dtype`.

    `features` is as in `host_kernels`. `worker` is an intp, `shared` a Shared, `own` a
    Private. Returns OK if the worker was told to stop or another one failed. Otherwise it
    says why this worker ended the loop of all: NO_RANDOMNESS if the operating system gave
    none, CUT_OFF if announced rows did not come, BAD_REQUEST if the accelerator asked for
    something that no step needs.
    """
    accept, draw_ahead = _leading(dtype, features)
    serve_chunk = _chunk_server(dtype, features)

    @inlined
    def serve_trips(worker, shared, own):
        control, leads = own.control, worker == 0
        flag = address(shared.ready, 0)
        own_served = address(own.served, FLAG_STRIDE * worker)
        pi = np.empty(GROUP_ROWS, np.int32)
        order = _Order(pi, np.empty_like(pi), np.empty(1, np.int64))
        moment, idle = np.empty(2, np.int64), np.zeros(2, np.int64)
        turn = served = announced = np.int64(0)
        start = np.int64(0)
        # Spins of worker 0 between a layer's last trip and the first of the next.
        gaps, layer, alarm = np.zeros(len(own.orders), np.int64), -1, np.int64(-1)
        while True:
            if leads:
                status, turn = wait_for_trip(flag, turn, own, idle, alarm)
                if layer >= 0:
                    gaps[layer] = idle[0]
            else:
                status, turn = wait_to_help(worker, turn, own, idle)
            if leads and status == OK:
                start = nanoseconds(moment)
                store_release(address(control, BUSY_SINCE), start)
                status = accept(shared, own, turn)
                announced += own.trip[TRIP_CHUNKS]
            if status != OK:
                return status
            if leads:
                wake(own, own.trip[TRIP_WORKERS])
                chunk = np.int64(0)
            elif worker < own.trip[TRIP_WORKERS]:
                chunk = _claim(own, turn)
            else:
                chunk = np.int64(-1)
            if chunk < 0:
                continue
            trip = _read_trip(own, turn)
            order.begin[0], idle[0] = -1, 0
            while chunk >= 0:
                status = serve_chunk(shared, own, trip, order, chunk)
                if status != OK:
                    return status
                served += 1
                store_release(own_served, served)
                chunk = _claim(own, turn)
            if leads:
                # The trip is not over before the others' last chunks are.
                status = wait_for_workers(own, announced)
                if status != OK:
                    return status
                own.counters[trip.layer, COUNT_TIME] += nanoseconds(moment) - start
                store_release(address(control, BUSY_SINCE), 0)
                layer, alarm = -1, -1
                if trip.kind == DECODE_FEATURES:
                    # Those that sleep wake shortly before it is as long ago again.
                    layer = trip.layer
                    alarm = gaps[layer] - LEAD_SPINS
                    # Nobody reads this layer's words before they are announced.
                    status = draw_ahead(own, trip.layer, trip.tokens)
                    if status != OK:
                        return status

    @numba.njit(nogil=True, error_model="numpy")
    def serve(worker, shared, own):
        shared, own = borrowed(shared, own)
        status = serve_trips(worker, shared, own)
        if status == ENDED:
            status = OK
        # Only the first worker that fails says so.
        if status != OK and not compare_exchange(
            address(own.control, STATUS), OK, status
        ):
            status = OK
        # Every worker does this after its last answer, so that the flags stay forsaken.
        for flag in range(0, len(shared.done), FLAG_STRIDE):
            store_release(address(shared.done, flag), FORSAKEN)
        wake(own, len(own.served))
        return status

    return serve
