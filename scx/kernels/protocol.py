"""What the two halves of a trip to the host agree on: chunks, flags, the bell.

The accelerator raises a chunk's `ready` flag to the turn in which it sent the
chunk, the host raises `done` to the turn in which it answered. The bell says
what to do: the turn in its high 32 bits, and in its low 32 bits hop, log2 of the
rows a chunk, and tokens of the step.
"""

from dataclasses import dataclass

import torch

MAX_CHUNK_ROWS = 32

# A short step is cut into so many chunks at least, where it has as many rows.
CHUNKS = 32

# A flag has a cache line to itself: its neighbours belong to other cores.
FLAG_BYTES = 64

TOKEN_BITS = 20
CHUNK_BITS = 3
HOP_BITS = 9

# Rows are shuffled within groups of so many.
GROUP_ROWS = 2048


def chunk_rows_of(num_tokens: int) -> int:
    """Rows a chunk, a power of two. Many small chunks keep both directions of the bus
    and all cores at work; beyond MAX_CHUNK_ROWS that gains nothing more."""
    rows = max(1, min(MAX_CHUNK_ROWS, num_tokens // CHUNKS))
    return 1 << (rows.bit_length() - 1)


def pack_bell(hop: int, chunk_rows: int, num_tokens: int) -> int:
    """The low 32 bits of the bell."""
    log_rows = chunk_rows.bit_length() - 1
    return ((hop << CHUNK_BITS) | log_rows) << TOKEN_BITS | num_tokens


@dataclass(frozen=True)
class Mailbox:
    """Pinned memory that both sides map."""

    inbox: torch.Tensor
    """Rows from the accelerator, flat."""
    outbox: torch.Tensor
    """Rows for the accelerator, flat."""
    positions: torch.Tensor
    """int64, one a token."""
    ready: torch.Tensor
    """int64, a cache line a chunk: the turn in which it was sent."""
    done: torch.Tensor
    """int64, a cache line a chunk: the turn in which it was answered."""
    bell: torch.Tensor
    """int64 (1,): turn and hop, as `pack_bell` has it."""

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
            ready=zeros(chunks * FLAG_BYTES // 8, torch.int64),
            done=zeros(chunks * FLAG_BYTES // 8, torch.int64),
            bell=zeros(1, torch.int64),
        )

    @property
    def nbytes(self) -> int:
        """Bytes of all the pinned memory."""
        return sum(tensor.nbytes for tensor in vars(self).values())
