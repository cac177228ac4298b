"""The numbers that the two halves of a trip to the host agree on.

The accelerator numbers its trips: 1, 2, 3. This turn is a signed 64-bit word, which
would last 292,000 years at one trip per microsecond. The accelerator raises a chunk's
`ready` flag to the turn in which it sent the chunk, and the host raises `done` to the
turn in which it answered. `request` says which hop of which layer the trip is, and for
how many rows. It is written before the flag of the first chunk, which begins the trip.
Nothing else needs to be said: the number of rows decides how they are cut into chunks
and groups, and where in the staging memory each group lies.

Two groups that lie in the same place follow each other. The accelerator sends the second
one's rows after it has received all answers of the first. By then the host has read the
first one's rows, and when it sees a row of the second, it may write the answers' place
again.

The memory itself is in `scx.kernels.mailbox`; this module does not load torch.
"""

import math

from scx.errors import SCXUnsupportedError

MAX_CHUNK_ROWS = 16

# A short step is cut into at least this many chunks if it has as many rows.
CHUNKS = 32

# A flag has a cache line to itself: its neighbours belong to other cores.
FLAG_BYTES = 64
FLAG_STRIDE = FLAG_BYTES // 8

# Rows are shuffled within groups of at most this many. In a step of several groups, each
# has at least half as many.
GROUP_ROWS = 1024
GROUP_CHUNKS = GROUP_ROWS // MAX_CHUNK_ROWS
# Groups that the memory between the two sides holds. A longer step uses it again and
# again, so that it stays in the host's last-level cache.
SLOTS = 4

# Words that the accelerator's kernel clears at once.
COUNTERS = 32

# `request` holds the hop above these bits and the number of rows in them.
ROWS_BITS = 32
LIMIT = 1 << 31
"""Rows per step, and hops, must stay below this: kernels count them in 32 bits."""

FORSAKEN = -1
"""The value of every `done` flag once the host has stopped answering, for any reason."""


def chunk_rows_of(num_tokens: int) -> int:
    """Rows per chunk, a power of two. Many small chunks keep all cores and both
    directions of the bus busy. Chunks above MAX_CHUNK_ROWS would gain nothing."""
    rows = 1
    while 2 * rows <= min(MAX_CHUNK_ROWS, num_tokens // CHUNKS):
        rows *= 2
    return rows


def group_of(row: int, num_tokens: int) -> tuple[int, int, int]:
    """The first row of the group in which `row` is shuffled, the row after its last, and
    the row of the staging memory where it begins.

    A group is whole chunks, and sizes differ by at most one chunk. A short last group
    would have an order that hides nothing.
    """
    chunks = (num_tokens + MAX_CHUNK_ROWS - 1) // MAX_CHUNK_ROWS
    groups = (chunks + GROUP_CHUNKS - 1) // GROUP_CHUNKS
    group = ((row // MAX_CHUNK_ROWS + 1) * groups - 1) // chunks
    begin, end = group * chunks // groups, (group + 1) * chunks // groups
    return (
        begin * MAX_CHUNK_ROWS,
        min(end * MAX_CHUNK_ROWS, num_tokens),
        group % SLOTS * GROUP_ROWS,
    )


def staging_rows(max_tokens: int) -> int:
    """Rows that the staging memory has for steps of at most `max_tokens` rows."""
    if max_tokens <= GROUP_ROWS:
        return max_tokens
    return min(math.ceil(max_tokens / GROUP_ROWS), SLOTS) * GROUP_ROWS


def progress_words(max_tokens: int) -> int:
    """Words in which the accelerator counts what has arrived in a step of at most
    `max_tokens` rows: programs, and chunks of each group."""
    groups = math.ceil(max_tokens / GROUP_ROWS)
    return 1 + math.ceil(groups / COUNTERS) * COUNTERS


def require_within_limits(max_tokens: int, hops: int) -> None:
    """Raise SCXUnsupportedError for more rows per step, or hops, than can be counted."""
    if max_tokens >= LIMIT:
        raise SCXUnsupportedError(
            f"max_num_batched_tokens={max_tokens}: with the host as secure device a step "
            f"has fewer than {LIMIT} tokens"
        )
    if hops >= LIMIT:
        raise SCXUnsupportedError(
            f"{hops} hops per step: with the host as secure device there are fewer than "
            f"{LIMIT}, so encode fewer layers"
        )
