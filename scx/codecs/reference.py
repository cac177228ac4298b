"""The permutation codec: how rows and features are encoded and decoded.

Pure functions on tensors and keys, in torch alone. They are the specification
that the fused kernels of `scx.kernels` are tested against. All results are new
tensors on the device of the first argument.

Letters: T tokens of the step, N query heads, M key/value heads of D features
on this rank; query head n belongs to key/value head n // (N // M).

Why it leaves attention as it is: for a permutation P of a head's features
(qP)(kP)^T = q k^T, so scores and softmax do not change, and softmax(s)(vP) =
(softmax(s) v)P, which P^-1 undoes. The scheme is that of SCX (SIGCOMM 2025,
doi 10.1145/3718958.3750509).
"""

import os
from collections.abc import Sequence

import torch

from scx.keys import RootKey

_WORD = torch.int64.itemsize


def draw_permutation(size: int, device: torch.device | None = None) -> torch.Tensor:
    """A fresh, uniform permutation of `size` rows: int64 (size,).

    Its randomness is the operating system's.
    """
    return _permutation_from(os.urandom(size * _WORD)).to(device)


def derive_feature_key(
    root: RootKey, layer: int, kv_heads: Sequence[int], head_dim: int
) -> torch.Tensor:
    """The feature permutations of a layer's key/value heads: int64 (M, D), on the CPU.

    `layer` and `kv_heads` are indices in the whole model, not in a rank, so
    that a KV cache is read at another tensor-parallel width or in another
    process that holds the same root key.
    """
    size = head_dim * _WORD
    words = [root.derive("features", layer, head, length=size) for head in kv_heads]
    return torch.stack([_permutation_from(word) for word in words])


def _permutation_from(random_bytes: bytes) -> torch.Tensor:
    """Sort random 64-bit words: uniform but for equal words, of chance below 2^-37
    at 2^14 rows."""
    if not random_bytes:
        return torch.empty(0, dtype=torch.int64)
    words = torch.frombuffer(bytearray(random_bytes), dtype=torch.int64)
    return words.argsort()


def embeddings_pi_left(hidden_states: torch.Tensor, pi: torch.Tensor) -> torch.Tensor:
    """Encode rows: row i of the result is row pi[i] of `hidden_states` (T, ...)."""
    return hidden_states.index_select(0, pi)


def decode_rows(rows: torch.Tensor, pi: torch.Tensor) -> torch.Tensor:
    """Undo `embeddings_pi_left`: row pi[i] of the result is row i of `rows` (T, ...)."""
    return torch.empty_like(rows).index_copy_(0, pi, rows)


def apply_rotary(
    heads: torch.Tensor,
    positions: torch.Tensor,
    cos_sin_cache: torch.Tensor,
    head_dim: int,
    is_neox_style: bool,
) -> torch.Tensor:
    """Rotate the heads (T, heads x D) to their positions (T,).

    `cos_sin_cache` (max_position, R) holds cosines, then sines, as vLLM's
    RotaryEmbedding keeps them; the first R of a head's D features turn, the
    others pass. Neox style pairs feature i with i + R/2, the other style 2i
    with 2i + 1. Calculated in float32 at least and rounded once.

    A position that the table does not have counts as the nearest that it has. vLLM
    sends none, but the accelerator that hands them over is not trusted.
    """
    wide = torch.promote_types(heads.dtype, torch.float32)
    rotary_dim = cos_sin_cache.shape[-1]
    rows = positions.clamp(0, len(cos_sin_cache) - 1)
    cos_sin = cos_sin_cache.index_select(0, rows).to(wide).unsqueeze(-2)
    cos, sin = cos_sin.chunk(2, dim=-1)
    rotated = heads.unflatten(-1, (-1, head_dim)).to(wide, copy=True)
    turning = rotated[..., :rotary_dim]
    if is_neox_style:
        first, second = turning.chunk(2, dim=-1)
    else:
        first, second = turning[..., 0::2], turning[..., 1::2]
    new_first = first * cos - second * sin
    new_second = second * cos + first * sin
    first.copy_(new_first)
    second.copy_(new_second)
    return rotated.flatten(-2).to(heads.dtype)


def rms_norm(heads: torch.Tensor, weight: torch.Tensor, epsilon: float) -> torch.Tensor:
    """The root mean square norm of each head of `heads` (T, heads x D), `weight` (D,).

    Calculated in float32 at least and rounded to the weight's type before they are
    multiplied, as vLLM's RMSNorm does (vllm/ir/ops/layernorm.py).
    """
    wide = torch.promote_types(heads.dtype, torch.float32)
    wide_heads = heads.unflatten(-1, (-1, len(weight))).to(wide)
    size = wide_heads.pow(2).mean(dim=-1, keepdim=True) + epsilon
    normed = (wide_heads * size.rsqrt()).to(weight.dtype) * weight
    return normed.flatten(-2).to(heads.dtype)


def encode_features(heads: torch.Tensor, key: torch.Tensor) -> torch.Tensor:
    """Permute the features of heads (T, heads x D) under `key` (M, D).

    Feature d of a head's result is its feature key[m, d], where m is the
    key/value head that the head belongs to: queries and keys or values take
    the same call.
    """
    return _gather_features(heads, key)


def decode_features(heads: torch.Tensor, key: torch.Tensor) -> torch.Tensor:
    """Undo `encode_features` with the same `key`."""
    return _gather_features(heads, key.argsort(dim=-1))


def _gather_features(heads: torch.Tensor, key: torch.Tensor) -> torch.Tensor:
    kv_heads, head_dim = key.shape
    columns_per_kv_head = heads.shape[-1] // kv_heads
    base = torch.arange(0, columns_per_kv_head, head_dim, device=key.device)
    first = torch.arange(0, heads.shape[-1], columns_per_kv_head, device=key.device)
    columns = first[:, None, None] + base[:, None] + key[:, None, :]
    return heads.index_select(-1, columns.flatten())
