"""How rows are encoded: shuffled by a fresh order in each step.

Plain functions on tensors, in torch alone. They are the specification that the fused
kernels of `scx.kernels` are tested against. Results are new tensors on the device of
the first argument. T is the number of tokens in the step.
"""

import os

import torch

WORD_BYTES = torch.int64.itemsize
"""Random bytes for each element that is put in order."""


def draw_permutation(size: int, device: torch.device | None = None) -> torch.Tensor:
    """A fresh, uniform permutation of `size` rows: int64 (size,).

    Its randomness is the operating system's.
    """
    return permutation_from(os.urandom(size * WORD_BYTES)).to(device)


def permutation_from(random_bytes: bytes) -> torch.Tensor:
    """The order that sorts random 64-bit words: int64 (words,), on the CPU.

    Uniform unless two words are equal: a chance below 2^-37 at 2^14 rows.
    """
    if not random_bytes:
        return torch.empty(0, dtype=torch.int64)
    words = torch.frombuffer(bytearray(random_bytes), dtype=torch.int64)
    return words.argsort()


def encode_rows(hidden_states: torch.Tensor, pi: torch.Tensor) -> torch.Tensor:
    """Encode rows: row i of the result is row pi[i] of `hidden_states` (T, ...)."""
    return hidden_states.index_select(0, pi)


embeddings_pi_left = encode_rows
"""The name that the scheme's authors gave it."""


def decode_rows(rows: torch.Tensor, pi: torch.Tensor) -> torch.Tensor:
    """Undo `encode_rows`: row pi[i] of the result is row i of `rows` (T, ...)."""
    return torch.empty_like(rows).index_copy_(0, pi, rows)
