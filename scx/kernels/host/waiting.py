"""How a worker waits: it spins for a while after its last work, then it sleeps.

Worker 0 watches a word that the accelerator writes, so it naps and looks again. The
others sleep in the operating system until worker 0 wakes those that a trip needs. A
trip does not depend on them: those that are awake serve all of it.
"""

import ctypes
import time

import numba
import numpy as np

from scx.kernels.host.compiled import inlined, libc
from scx.kernels.host.llvm import compare_exchange, fence, load_acquire, relax
from scx.kernels.host.memory import (
    CUT_OFF,
    OK,
    STATUS,
    STOP,
    TRIP_WORKERS,
    TURN,
    address,
)
from scx.kernels.protocol import FLAG_BYTES, FLAG_STRIDE

ENDED = -1
"""The result of a wait that stops because its worker must."""

# About 40 ns per spin. Worker 0: 20 ms, more than the gap between two decode steps. The
# others: 300 us, more than the gaps between the trips of a layer, and they are woken half
# of that before a trip is due.
_SPINS = 500_000
_HELPER_SPINS = 8_000
LEAD_SPINS = 4_000
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
_sem_init = libc("sem_init", ctypes.c_size_t, ctypes.c_int, ctypes.c_uint)
_sem_wait = libc("sem_wait", ctypes.c_size_t)
_sem_post = libc("sem_post", ctypes.c_size_t)
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
def wait_for_trip(flag, last, own, idle, alarm):
    """Worker 0's wait until the turn at address `flag` is no longer `last`: OK or ENDED,
    and the turn. After `alarm` spins it wakes those that served the last trip.

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
            if idle[0] == alarm:
                wake(own, own.trip[TRIP_WORKERS])
            spin(idle[0])
            idle[0] += 1
        elif idle[1] < _SHORT_NAPS:
            _usleep(_SHORT_NAP_MICROSECONDS)
            idle[1] += 1
        else:
            _usleep(_LONG_NAP_MICROSECONDS)


@inlined
def wait_to_help(worker, last, own, idle):
    """Another worker's wait until a turn after `last` is announced: OK or ENDED, and the
    turn. `idle` is as in `wait_for_trip`."""
    turn, asleep = address(own.control, TURN), address(own.asleep, FLAG_STRIDE * worker)
    while True:
        now = load_acquire(turn)
        if now != last:
            return OK, now
        if _must_end(own):
            return ENDED, last
        if idle[0] < _HELPER_SPINS:
            spin(idle[0])
            idle[0] += 1
            continue
        compare_exchange(asleep, 0, 1)
        fence()
        # Unless nothing came meanwhile, and unless nobody saw it asleep before.
        changed = load_acquire(turn) != last or _must_end(own)
        if not changed or not compare_exchange(asleep, 1, 0):
            while _sem_wait(own.semaphores.ctypes.data + FLAG_BYTES * worker) != 0:
                pass
            idle[0] = 0


@inlined
def wake(own, workers):
    """Wake those of the first `workers` that sleep, after what this thread wrote."""
    fence()
    for worker in range(1, workers):
        if compare_exchange(address(own.asleep, FLAG_STRIDE * worker), 1, 0):
            _sem_post(own.semaphores.ctypes.data + FLAG_BYTES * worker)


@numba.njit(nogil=True)
def wake_all(own):
    """Wake every worker, so that it sees that it must end."""
    wake(own, len(own.asleep))


def new_semaphores(workers: int) -> np.ndarray:
    """`Private.semaphores`, each of them 0."""
    words = np.zeros((workers, FLAG_STRIDE), np.int64)
    for worker in range(workers):
        _sem_init(words.ctypes.data + FLAG_BYTES * worker, 0, 0)
    return words


@inlined
def nanoseconds(moment):
    """The clock of `time.monotonic`. `moment`, int64 (2,), takes a struct timespec."""
    _clock_gettime(_MONOTONIC, moment.ctypes)
    return 1_000_000_000 * moment[0] + moment[1]
