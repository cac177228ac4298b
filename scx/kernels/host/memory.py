"""The memory that the workers share, with the accelerator and with each other.

Who writes and who reads each shared word:

    word     written by        read by      why that order is safe
    request  accelerator       worker 0     read once, checked, copied to `trip`
    ready    accelerator       all workers  released after the chunk's rows and positions;
                                            the first chunk's also after `request`
    done     all workers       accelerator  released after the chunk's answer
    TURN     worker 0          the others   released after `trip`, the words and CLAIMS
    CLAIMS   all workers       all workers  compare-exchange; it holds the turn, so that a
                                            late worker cannot claim in another trip
    served   its own worker    worker 0     released after the chunk; a trip is over, and
                                            the next announced, once all its chunks are
    BUSY_*   worker 0          any thread   since when, and which, a trip is being served;
                                            0 from its end on. Nothing is read by them
    counters worker 0          any thread   each is one word, which only grows
    asleep   its own worker,   its own,     compare-exchange; who clears another's posts
             who wakes it      who wakes it its semaphore. A worker sets it and then looks
                                            at TURN, worker 0 writes TURN and then looks
                                            at it, each with a fence in between
    STOP     any thread        all workers  ends every wait
    STATUS   first that fails  all workers  compare-exchange from OK; ends every wait

The first three lie in memory that the accelerator can write at any time. It is not
trusted: what comes from there is only compared, or read once and then checked, or copied
as data. The rest belongs to this process.
"""

from typing import NamedTuple

import numba
import numpy as np

from scx.kernels.host.compiled import inlined
from scx.kernels.host.llvm import pointer
from scx.kernels.protocol import FLAG_STRIDE

# What a worker's loop returns, and the values of STATUS.
OK, NO_RANDOMNESS, CUT_OFF, BAD_REQUEST, DIED = range(5)

# Words of `control`, one cache line each.
STOP, STATUS, TURN, CLAIMS, BUSY_SINCE, BUSY_HOP = range(0, 6 * FLAG_STRIDE, FLAG_STRIDE)
CONTROL_WORDS = 6 * FLAG_STRIDE
# Columns of the table of hops, and the kinds of hops.
HOP_KIND, HOP_LAYER, HOP_WIDTH = range(3)
ENCODE_ROWS, ENCODE_FEATURES, DECODE_FEATURES = range(3)
# Columns of `trip`.
TRIP_HOP, TRIP_TOKENS, TRIP_CHUNKS, TRIP_WORKERS = range(4)
# Columns of `orders`: words drawn ahead for the next step, and rows of the current step
# whose features are still to come.
FRESH, SENT = range(2)
# Columns of the counters. The time is in nanoseconds.
COUNT_STEPS, COUNT_CROSSINGS, COUNT_BYTES_IN, COUNT_BYTES_OUT, COUNT_TIME = range(5)


class Shared(NamedTuple):
    """The arrays of a Mailbox, which the accelerator maps. Rows are of its element type,
    with uint16 for the bits of a 16-bit float."""

    inbox: np.ndarray
    outbox: np.ndarray
    positions: np.ndarray
    ready: np.ndarray
    done: np.ndarray
    request: np.ndarray


class Private(NamedTuple):
    """This process's own memory."""

    control: np.ndarray
    """int64 (CONTROL_WORDS,)"""
    served: np.ndarray
    """int64 (workers, FLAG_STRIDE): column 0 counts the chunks that each has served."""
    asleep: np.ndarray
    """int64 (workers, FLAG_STRIDE): column 0 is 1 while each waits for its semaphore."""
    semaphores: np.ndarray
    """int64 (workers, FLAG_STRIDE): a sem_t of the C library for each."""
    trip: np.ndarray
    """int64 (4,): the trip that worker 0 announced, and how many workers serve it."""
    hops: np.ndarray
    """int64 (hops, 3): kind, layer and width."""
    orders: np.ndarray
    """int64 (layers, 2): FRESH and SENT, for worker 0 only."""
    words: np.ndarray
    """uint64 (layers, max_tokens): the random words of each layer's row order."""
    encoding_keys: np.ndarray
    """(layers, ...): packed for the codec's kernels."""
    decoding_keys: np.ndarray
    """(layers, ...): packed for the codec's kernels."""
    cos_sin: np.ndarray
    """float32 (rows, R): the rotary tables, one after another."""
    rotary_rows: np.ndarray
    """int64 (layers, 2): the first row of a layer's table, and the row after its last."""
    counters: np.ndarray
    """int64 (layers, 5)"""
    num_heads: int
    is_neox_style: bool
    patience: int
    """The most short naps that a worker takes while it waits for a chunk."""


@inlined
def address(words, index):
    """The address of one of an array's 64-bit words."""
    return words.ctypes.data + 8 * index


@inlined
def _borrowed(array):
    return numba.carray(pointer(array.ctypes.data), array.shape, array.dtype)


@inlined
def borrowed(shared, own):
    """The same memory in arrays that do not own it, and which the caller's must outlive.

    numba counts references to arrays that own memory: dozens of atomic additions per
    chunk, to words that all workers would write.
    """
    return (
        Shared(
            _borrowed(shared.inbox),
            _borrowed(shared.outbox),
            _borrowed(shared.positions),
            _borrowed(shared.ready),
            _borrowed(shared.done),
            _borrowed(shared.request),
        ),
        Private(
            _borrowed(own.control),
            _borrowed(own.served),
            _borrowed(own.asleep),
            _borrowed(own.semaphores),
            _borrowed(own.trip),
            _borrowed(own.hops),
            _borrowed(own.orders),
            _borrowed(own.words),
            _borrowed(own.encoding_keys),
            _borrowed(own.decoding_keys),
            _borrowed(own.cos_sin),
            _borrowed(own.rotary_rows),
            _borrowed(own.counters),
            own.num_heads,
            own.is_neox_style,
            own.patience,
        ),
    )
