"""The accelerator's half of a trip to the host and back, as one Triton kernel.

CUDA graphs rule out a step that waits for Python. This kernel waits only for the host's
threads (`scx.kernels.host.worker`): it writes rows to pinned memory that both sides map,
raises a flag there, polls another flag, and reads the rows that the host wrote. To a
stream or a captured graph it is a kernel like any other, and each replay sends what its
buffers hold at that moment.

The rows are cut into chunks. Half of the programs send chunks in order and half receive
them, so that some rows leave while others arrive. There are few programs: if all chunks
were sent at once, all would reach the host at once, at the end. Memory shared with the
host is written before a release store and read after an acquire load, both of system
scope. A step that is longer than that memory sends a group's rows when the answers of the
group that lay there before have been received.
"""

import functools
from typing import Any

import torch
import triton
import triton.language as tl

from scx.kernels.cuda.groups import begin_of, group_of, groups_of
from scx.kernels.mailbox import Mailbox
from scx.kernels.protocol import (
    COUNTERS,
    FLAG_STRIDE,
    FORSAKEN,
    GROUP_ROWS,
    MAX_CHUNK_ROWS,
    ROWS_BITS,
    SLOTS,
    chunk_rows_of,
)

# After this many polls the host has died without a word, and the kernel traps, which vLLM
# reports as a CUDA error. Each poll is a read across the bus, about 1 us. A host that
# stops in order raises its flags to FORSAKEN, and no trip waits for it.
POLLS = 30_000_000

_FLAG_STRIDE = tl.constexpr(FLAG_STRIDE)
_ROWS_BITS = tl.constexpr(ROWS_BITS)
_FORSAKEN = tl.constexpr(FORSAKEN)
_BLOCK = tl.constexpr(8192)
_CHUNK_ROWS = tl.constexpr(MAX_CHUNK_ROWS)
_GROUP_ROWS = tl.constexpr(GROUP_ROWS)
_SLOTS = tl.constexpr(SLOTS)
_COUNTERS = tl.constexpr(COUNTERS)
_WARPS = 8
# The most programs that send. As many receive. In a long step they wait for each other,
# so all must run at once: there are no more than multiprocessors.
_LANES = 48


@triton.jit
def _raise_flag(pointer, value):
    """Release `value` to the system, from one thread, as each such store waits for the
    bus."""
    tl.debug_barrier()
    tl.inline_asm_elementwise(
        """{
        .reg .pred other;
        .reg .u32 thread;
        mov.u32 thread, %tid.x;
        setp.ne.u32 other, thread, 0;
        @!other st.release.sys.global.u64 [$1], $2;
        mov.u64 $0, $2;
        }""",
        "=l,l,l",
        [pointer.to(tl.int64), value],
        dtype=tl.int64,
        is_pure=False,
        pack=1,
    )


@triton.jit
def _await_flag(pointer, value, limit):
    """Poll until `value` is acquired from the system, in one thread. Trap if FORSAKEN
    comes instead, or after `limit` polls."""
    tl.inline_asm_elementwise(
        """{
        .reg .pred other, seen, late, forsaken;
        .reg .u32 thread;
        .reg .u64 flag, polls;
        mov.u32 thread, %tid.x;
        setp.ne.u32 other, thread, 0;
        @other bra AWAITED;
        mov.u64 polls, 0;
        AWAIT:
        ld.acquire.sys.global.u64 flag, [$1];
        setp.eq.u64 seen, flag, $2;
        @seen bra AWAITED;
        setp.eq.s64 forsaken, flag, $4;
        @forsaken trap;
        add.u64 polls, polls, 1;
        setp.ge.u64 late, polls, $3;
        @late trap;
        bra AWAIT;
        AWAITED:
        mov.u64 $0, $2;
        }""",
        "=l,l,l,l,l",
        [pointer.to(tl.int64), value, limit.to(tl.int64), tl.cast(_FORSAKEN, tl.int64)],
        dtype=tl.int64,
        is_pure=False,
        pack=1,
    )
    tl.debug_barrier()


@triton.jit
def _place_of(first, num_tokens):
    """The group of row `first`, and where in the staging memory that row lies."""
    group = group_of(first, num_tokens)
    return group, group % _SLOTS * _GROUP_ROWS + first - begin_of(group, num_tokens)


@triton.jit
def _await_answers(received, group, num_tokens):
    """Wait until all chunks of a group have been received."""
    rows = begin_of(group + 1, num_tokens) - begin_of(group, num_tokens)
    while tl.atomic_add(received + group, 0) < rows // _CHUNK_ROWS:
        pass


@triton.jit(do_not_specialize=["num_tokens", "chunk_rows", "hop", "limit"])
def _exchange(
    source,
    target,
    positions,
    inbox,
    outbox,
    inbox_positions,
    ready,
    done,
    request,
    sequence,
    progress,
    num_tokens,
    chunk_rows,
    hop,
    limit,
    WIDTH: tl.constexpr,
    WITH_POSITIONS: tl.constexpr,
):
    program = tl.program_id(0)
    lanes = tl.num_programs(0) // 2
    turn = tl.load(sequence) + 1
    chunks = tl.cdiv(num_tokens, chunk_rows)
    groups = groups_of(num_tokens)
    received = progress + 1
    if program < lanes:
        for chunk in range(program, chunks, lanes):
            first = tl.cast(chunk, tl.int64) * chunk_rows
            rows = tl.minimum(num_tokens - first, chunk_rows)
            group, place = _place_of(first, num_tokens)
            if group >= _SLOTS:
                _await_answers(received, group - _SLOTS, num_tokens)
            for start in range(0, rows * WIDTH, _BLOCK):
                column = start + tl.arange(0, _BLOCK)
                inside = column < rows * WIDTH
                sent = tl.load(source + first * WIDTH + column, inside)
                tl.store(inbox + place * WIDTH + column, sent, inside)
            if WITH_POSITIONS:
                row = tl.arange(0, _CHUNK_ROWS)
                sent = tl.load(positions + first + row, row < rows)
                tl.store(inbox_positions + place + row, sent, row < rows)
            if chunk == 0:
                tl.store(request, (tl.cast(hop, tl.int64) << _ROWS_BITS) | num_tokens)
            _raise_flag(ready + chunk * _FLAG_STRIDE, turn)
    else:
        for chunk in range(program - lanes, chunks, lanes):
            first = tl.cast(chunk, tl.int64) * chunk_rows
            rows = tl.minimum(num_tokens - first, chunk_rows)
            group, place = _place_of(first, num_tokens)
            _await_flag(done + chunk * _FLAG_STRIDE, turn, limit)
            for start in range(0, rows * WIDTH, _BLOCK):
                column = start + tl.arange(0, _BLOCK)
                inside = column < rows * WIDTH
                # Bypass the caches: the host wrote this while the kernel ran.
                answer = outbox + place * WIDTH + column
                came = tl.load(answer, inside, cache_modifier=".cv")
                tl.store(target + first * WIDTH + column, came, inside)
            if groups > _SLOTS:
                tl.debug_barrier()
                tl.atomic_add(received + group, 1)
    tl.debug_barrier()
    # The last program to arrive advances the turn, before the next kernel starts.
    if tl.atomic_add(progress, 1) == 2 * lanes - 1:
        for start in range(0, groups, _COUNTERS):
            tl.store(received + start + tl.arange(0, _COUNTERS), 0)
        tl.store(progress, 0)
        tl.store(sequence, turn)


@functools.cache
def _lanes_of(device: torch.device) -> int:
    found = torch.cuda.get_device_properties(device)
    return min(_LANES, found.multi_processor_count // 2)


def exchange(
    source: torch.Tensor,
    target: torch.Tensor,
    positions: torch.Tensor | None,
    mailbox: Mailbox,
    sequence: torch.Tensor,
    progress: torch.Tensor,
    hop: int,
) -> None:
    """Send the rows of `source` (T, W) to the host and receive `target` (T, W).

    Both must be contiguous, of the mailbox's dtype, and on the accelerator, as is
    `positions`, int64 (T,) or None. They are addressed without strides, and nothing is
    checked. `target` may be any memory that does not overlap `source`. `sequence`, int64
    (1,), and `progress`, int32 (progress_words,), belong to the accelerator and start
    at 0. `hop` is the index of the trip in the host's table. Runs on the current stream,
    asynchronously.
    """
    num_tokens, width = source.shape
    if num_tokens == 0:
        return
    chunk_rows = chunk_rows_of(num_tokens)
    lanes = min(_lanes_of(source.device), triton.cdiv(num_tokens, chunk_rows))
    launch: Any = _exchange[(2 * lanes,)]
    launch(
        source,
        target,
        source if positions is None else positions,
        mailbox.inbox,
        mailbox.outbox,
        mailbox.positions,
        mailbox.ready,
        mailbox.done,
        mailbox.request,
        sequence,
        progress,
        num_tokens,
        chunk_rows,
        hop,
        POLLS,
        WIDTH=width,
        WITH_POSITIONS=positions is not None,
        num_warps=_WARPS,
    )
