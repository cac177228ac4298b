"""How a worker waits: it spins for a while after its last work, then it naps."""

import ctypes
import time

from scx.kernels.host.compiled import inlined, libc
from scx.kernels.host.llvm import load_acquire, relax
from scx.kernels.host.memory import CUT_OFF, OK, STATUS, STOP, address
from scx.kernels.protocol import FLAG_STRIDE

ENDED = -1
"""The result of a wait that stops because its worker must."""

# About 40 ns per spin: 20 ms, more than the gap between two decode steps.
_SPINS = 500_000
# After this many spins a waiting thread yields its core now and then, since there may be
# more threads than cores.
_SPINS_ALONE = 250
_SPINS_PER_YIELD = 25
# Naps stay short while an engine may be between two layers of a long step. They get long
# after about a second without work, to leave the cores alone.
_SHORT_NAP_MICROSECONDS, _LONG_NAP_MICROSECONDS = 50, 1000
_SHORT_NAPS = 10_000

_sched_yield = libc("sched_yield")
_usleep = libc("usleep", ctypes.c_uint)
_clock_gettime = libc("clock_gettime", ctypes.c_int, ctypes.c_void_p)
_MONOTONIC = time.CLOCK_MONOTONIC


@inlined
def spin(count):
    """Wait for a moment. `count` is the number of spins before this one."""
    relax()
    if count > _SPINS_ALONE and count % _SPINS_PER_YIELD == 0:
        _sched_yield()


@inlined
def _must_end(own):
    control = own.control
    return (
        load_acquire(address(control, STOP)) != 0
        or load_acquire(address(control, STATUS)) != OK
    )


@inlined
def wait_for_workers(own, chunks):
    """Wait until all workers together have served `chunks` chunks: OK or ENDED."""
    spins = 0
    while not _must_end(own):
        served = 0
        for worker in range(len(own.served)):
            served += load_acquire(address(own.served, FLAG_STRIDE * worker))
        if served == chunks:
            return OK
        spin(spins)
        spins += 1
    return ENDED


@inlined
def wait_for_rows(shared, own, first, last, turn):
    """Wait for chunks [first, last) of a trip: OK once all are there, ENDED if this
    worker must stop, CUT_OFF if a chunk does not come."""
    for chunk in range(first, last):
        flag = address(shared.ready, FLAG_STRIDE * chunk)
        spins = naps = 0
        while load_acquire(flag) != turn:
            if _must_end(own):
                return ENDED
            if spins < _SPINS:
                spin(spins)
                spins += 1
            elif naps < own.patience:
                _usleep(_SHORT_NAP_MICROSECONDS)
                naps += 1
            else:
                return CUT_OFF
    return OK


@inlined
def wait_for_trip(flag, last, own, idle):
    """Wait until the turn at address `flag` is no longer `last`: OK or ENDED, and the
    turn.

    `idle`, int64 (2,), counts what this worker waited: spins since its last work,
    naps since the last trip.
    """
    while True:
        turn = load_acquire(flag)
        if turn != last:
            idle[1] = 0
            return OK, turn
        if _must_end(own):
            return ENDED, last
        if idle[0] < _SPINS:
            spin(idle[0])
            idle[0] += 1
        elif idle[1] < _SHORT_NAPS:
            _usleep(_SHORT_NAP_MICROSECONDS)
            idle[1] += 1
        else:
            _usleep(_LONG_NAP_MICROSECONDS)


@inlined
def nanoseconds(moment):
    """The clock of `time.monotonic`. `moment`, int64 (2,), takes a struct timespec."""
    _clock_gettime(_MONOTONIC, moment.ctypes)
    return 1_000_000_000 * moment[0] + moment[1]
