"""What the two halves of a trip to the host agree on.

The accelerator numbers its trips: 1, 2, 3. The turn is a signed 64-bit word, which
trips of a microsecond each fill in 292,000 years. It raises a chunk's `ready` flag
to the turn in which it sent the chunk, and the host raises `done` to the turn in
which it answered. `request` says which hop of which layer the trip is, and for how
many rows; it is written before the flag of the first chunk, which begins the trip.
Nothing else is told: how rows are cut into chunks and groups follows from their
number.
"""

from dataclasses import dataclass

import torch

from scx.errors import SCXUnsupportedError

MAX_CHUNK_ROWS = 32

# A short step is cut into at least this many chunks if it has as many rows.
CHUNKS = 32

# A flag has a cache line to itself: its neighbours belong to other cores.
FLAG_BYTES = 64
FLAG_STRIDE = FLAG_BYTES // 8

# Rows are shuffled within groups of about so many: three quarters to one and a half of
# it in a step of several groups.
GROUP_ROWS = 2048

# `request` holds the hop above these bits and the number of rows in them.
ROWS_BITS = 32
LIMIT = 1 << 31
"""Rows of a step, and hops, must stay below this: kernels count them in 32 bits."""

FORSAKEN = -1
"""The value of every `done` flag once the host answers no more, whatever the reason."""


def chunk_rows_of(num_tokens: int) -> int:
    """Rows per chunk, a power of two. Many small chunks keep both directions of the bus
    and all cores at work; beyond MAX_CHUNK_ROWS that gains nothing more."""
    rows = 1
    while 2 * rows <= min(MAX_CHUNK_ROWS, num_tokens // CHUNKS):
        rows *= 2
    return rows


def group_of(row: int, num_tokens: int) -> tuple[int, int]:
    """The first row of the group that `row` is shuffled in, and the row after its last.

    Groups are whole chunks, and of one size but for a chunk: what was left over would
    make a group so small that its order hides nothing.
    """
    groups = max((num_tokens + GROUP_ROWS // 2) // GROUP_ROWS, 1)
    chunks = (num_tokens + MAX_CHUNK_ROWS - 1) // MAX_CHUNK_ROWS
    group = ((row // MAX_CHUNK_ROWS + 1) * groups - 1) // chunks
    begin, end = group * chunks // groups, (group + 1) * chunks // groups
    return begin * MAX_CHUNK_ROWS, min(end * MAX_CHUNK_ROWS, num_tokens)


def require_within_limits(max_tokens: int, hops: int) -> None:
    """Raise SCXUnsupportedError for more rows per step, or hops, than can be told."""
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


@dataclass(frozen=True)
class Mailbox:
    """Pinned memory that both sides map. The accelerator can write it at any time."""

    inbox: torch.Tensor
    """Rows from the accelerator, flat."""
    outbox: torch.Tensor
    """Rows for the accelerator, flat."""
    positions: torch.Tensor
    """int64, one per token."""
    ready: torch.Tensor
    """int64, a cache line per chunk: the turn in which it was sent."""
    done: torch.Tensor
    """int64, a cache line per chunk: the turn in which it was answered, or FORSAKEN."""
    request: torch.Tensor
    """int64 (1,): the hop, shifted by ROWS_BITS, and the rows of that turn."""

    @classmethod
    def allocate(cls, max_tokens: int, max_width: int, dtype: torch.dtype) -> "Mailbox":
        """For steps of `max_tokens` rows of `max_width` elements; flags start at 0."""
        chunks = max_tokens // MAX_CHUNK_ROWS + 2 * CHUNKS

        def zeros(count: int, kind: torch.dtype) -> torch.Tensor:
            # vLLM builds models under a default device, so the host is named here.
            pinned = torch.cuda.is_available()
            return torch.zeros(count, dtype=kind, device="cpu", pin_memory=pinned)

        return cls(
            inbox=zeros(max_tokens * max_width, dtype),
            outbox=zeros(max_tokens * max_width, dtype),
            positions=zeros(max_tokens, torch.int64),
            ready=zeros(chunks * FLAG_STRIDE, torch.int64),
            done=zeros(chunks * FLAG_STRIDE, torch.int64),
            request=zeros(1, torch.int64),
        )

    @property
    def nbytes(self) -> int:
        """Bytes of all the pinned memory."""
        return sum(tensor.nbytes for tensor in vars(self).values())
