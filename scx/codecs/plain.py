"""What is done to queries and keys in the clear: RoPE, as vLLM does it.

A plain function on tensors, in torch alone. It is the specification that the fused
kernels of `scx.kernels` are tested against. Its result is a new tensor on the device of
the first argument.

Letters: T tokens of the step, heads of D features.
"""

import torch


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
    sends none, but the accelerator that hands them over is not trusted. So a table of one
    row has one angle for all positions, and no head turns if its cosines are 1 and its
    sines 0.
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
