"""What the two halves of a trip to the host agree on: chunks, flags, the bell.

The accelerator raises a chunk's `ready` flag to the turn in which it sent the
chunk, the host raises `done` to the turn in which it answered. The bell says
what to do: the turn in its high 32 bits, and in its low 32 bits hop, log2 of the
rows a chunk, and tokens of the step.
"""

MIN_CHUNK_ROWS = 4
MAX_CHUNK_ROWS = 64

# A flag has a cache line to itself: its neighbours belong to other cores.
FLAG_BYTES = 64

TOKEN_BITS = 20
CHUNK_BITS = 3
HOP_BITS = 9

# Rows are shuffled within groups of so many.
GROUP_ROWS = 2048


def chunk_rows_of(num_tokens: int) -> int:
    """Rows a chunk, a power of two. One chunk up to 7 tokens, as more flags would cost
    more than the rows; up to eight for a decode batch; for a long prefill chunks
    that are small beside the whole."""
    rows = max(MIN_CHUNK_ROWS, min(MAX_CHUNK_ROWS, num_tokens // 8))
    return 1 << (rows.bit_length() - 1)


def pack_bell(hop: int, chunk_rows: int, num_tokens: int) -> int:
    """The low 32 bits of the bell."""
    log_rows = chunk_rows.bit_length() - 1
    return ((hop << CHUNK_BITS) | log_rows) << TOKEN_BITS | num_tokens
