"""The groups in which rows are shuffled, in Triton: `scx.kernels.protocol.group_of`."""

import triton
import triton.language as tl

from scx.kernels.protocol import GROUP_CHUNKS, MAX_CHUNK_ROWS

_GROUP_CHUNKS = tl.constexpr(GROUP_CHUNKS)
_CHUNK_ROWS = tl.constexpr(MAX_CHUNK_ROWS)


@triton.jit
def _chunks_of(num_tokens):
    return tl.cdiv(tl.cast(num_tokens, tl.int64), _CHUNK_ROWS)


@triton.jit
def groups_of(num_tokens):
    """How many groups a step has: int64."""
    return tl.cdiv(_chunks_of(num_tokens), _GROUP_CHUNKS)


@triton.jit
def group_of(row, num_tokens):
    """The number of a row's group: int64."""
    groups, chunks = groups_of(num_tokens), _chunks_of(num_tokens)
    return ((row // _CHUNK_ROWS + 1) * groups - 1) // chunks


@triton.jit
def begin_of(group, num_tokens):
    """The first row of a group: int64. For the number of groups, it is the first row of
    the chunk after the last."""
    return group * _chunks_of(num_tokens) // groups_of(num_tokens) * _CHUNK_ROWS
