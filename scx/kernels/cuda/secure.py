"""Fused forms of `scx.codecs` for an accelerator that is itself the secure device.

Three Triton kernels per step put rows in a fresh order, rotate and encode features, and
decode features; for more than 256 rows another one draws the random words of the order
first. None waits for the host. They can be captured in a graph, and each replay draws a
new order: the words are the keystream of ChaCha20 (RFC 8439) under a key from the
operating system, with a step counter in the accelerator's memory as its nonce. The kernel
that encodes features advances it.

Heads are read and written as they lie in memory, a vector at a time, and their features
change places in between, in registers and shared memory.

The codec is their specification, and results equal its results bit for bit: float32
arithmetic in the same order, without fused multiply-adds.

Letters are those of the codec; H is the number of columns of hidden_states, R the number
of features of a head that rotate.
"""

from typing import Any

import torch
import triton
import triton.language as tl

from scx.kernels.cuda.groups import begin_of, group_of

_WORDS = tl.constexpr(256)
"""Random words that a program draws, or compares, at once."""
_FEW_WORDS = (128, 256)
"""Random words that each program draws for itself, one per thread, if they suffice."""
_LAST_WORD = tl.constexpr(2**63 - 1)
_ELEMENTS = tl.constexpr(4096)
"""What a program moves at once."""
_WARPS = 4
_FEATURE_ROWS, _FEATURE_WARPS = 4, 1
"""Rows of a head per program, with 2 KiB or less, and its warps."""


@triton.jit
def _rotate_left(word, count):
    return (word << count) | (word >> (32 - count))


@triton.jit
def _quarter_round(a, b, c, d):
    a += b
    d = _rotate_left(d ^ a, 16)
    c += d
    b = _rotate_left(b ^ c, 12)
    a += b
    d = _rotate_left(d ^ a, 8)
    c += d
    b = _rotate_left(b ^ c, 7)
    return a, b, c, d


@triton.jit
def _key_word(key, index, like):
    return tl.load(key + index).to(tl.uint32, bitcast=True) + tl.zeros_like(like)


@triton.jit
def _chacha20(key, nonce, block):
    """The first 64 bits of each block in `block`, uint32, of the keystream, as int64.

    `key` points to eight int32. `nonce`, an int64, is the nonce's first two words.
    """
    zero = tl.zeros_like(block)
    x0, x1 = zero + 0x61707865, zero + 0x3320646E
    x2, x3 = zero + 0x79622D32, zero + 0x6B206574
    first, second = x0, x1
    x4, x5 = _key_word(key, 0, block), _key_word(key, 1, block)
    x6, x7 = _key_word(key, 2, block), _key_word(key, 3, block)
    x8, x9 = _key_word(key, 4, block), _key_word(key, 5, block)
    x10, x11 = _key_word(key, 6, block), _key_word(key, 7, block)
    x12 = block
    x13 = zero + nonce.to(tl.uint32)
    x14 = zero + (nonce >> 32).to(tl.uint32)
    x15 = zero
    for _ in range(10):
        x0, x4, x8, x12 = _quarter_round(x0, x4, x8, x12)
        x1, x5, x9, x13 = _quarter_round(x1, x5, x9, x13)
        x2, x6, x10, x14 = _quarter_round(x2, x6, x10, x14)
        x3, x7, x11, x15 = _quarter_round(x3, x7, x11, x15)
        x0, x5, x10, x15 = _quarter_round(x0, x5, x10, x15)
        x1, x6, x11, x12 = _quarter_round(x1, x6, x11, x12)
        x2, x7, x8, x13 = _quarter_round(x2, x7, x8, x13)
        x3, x4, x9, x14 = _quarter_round(x3, x4, x9, x14)
    low, high = (x0 + first).to(tl.uint64), (x1 + second).to(tl.uint64)
    return (low | (high << 32)).to(tl.int64, bitcast=True)


@triton.jit(do_not_specialize=["num_tokens"])
def _draw_words(words, key, step, num_tokens):
    row = tl.program_id(0) * _WORDS + tl.arange(0, _WORDS)
    drawn = _chacha20(key, tl.load(step), row.to(tl.uint32))
    tl.store(words + row, drawn, row < num_tokens)


@triton.jit(do_not_specialize=["num_tokens"])
def _order_rows(
    source,
    target,
    words,
    key,
    step,
    rank,
    num_tokens,
    WIDTH: tl.constexpr,
    DRAWN: tl.constexpr,
    ROWS: tl.constexpr,
):
    first = tl.program_id(0) * ROWS
    row = first + tl.arange(0, ROWS)
    group = group_of(first, num_tokens)
    begin = begin_of(group, num_tokens)
    end = tl.minimum(begin_of(group + 1, num_tokens), num_tokens)
    if DRAWN > 0:
        other = tl.arange(0, DRAWN)
        word = _chacha20(key, tl.load(step), other.to(tl.uint32))[None, :]
        is_own = other[None, :] == row[:, None]
        own = tl.sum(tl.where(is_own, word, 0), 1, keep_dims=True)
        drawn = (other < num_tokens)[None, :]
        smaller = (_is_smaller(word, own, other, row) & drawn).to(tl.int32)
    else:
        smaller = tl.zeros([ROWS, _WORDS], tl.int32)
        own = tl.load(words + row, row < num_tokens)[:, None]
        for start in range(begin, end, _WORDS):
            other = start + tl.arange(0, _WORDS)
            word = tl.load(words + other, other < end, _LAST_WORD)[None, :]
            # Of two equal words the first row's comes first, if they ever occur. Only
            # beside its own rows a program has to look which that is.
            if start + _WORDS <= first:
                smaller += word <= own
            elif start >= first + ROWS:
                smaller += word < own
            else:
                smaller += _is_smaller(word, own, other, row)
    place = begin + tl.sum(smaller, 1)
    tl.store(rank + row, place, row < num_tokens)
    row = row.to(tl.int64)[:, None]
    for start in range(0, WIDTH, _ELEMENTS // ROWS):
        column = (start + tl.arange(0, _ELEMENTS // ROWS))[None, :]
        inside = (row < num_tokens) & (column < WIDTH)
        moved = tl.load(source + row * WIDTH + column, inside)
        tl.store(target + place[:, None] * WIDTH + column, moved, inside)


@triton.jit
def _is_smaller(word, own, other, row):
    return (word < own) | ((word == own) & (other[None, :] < row[:, None]))


@triton.jit
def _kv_head(head, HEADS: tl.constexpr, KV_HEADS: tl.constexpr):
    """Whose key serves a head of qkv."""
    return tl.where(head < HEADS, head // (HEADS // KV_HEADS), (head - HEADS) % KV_HEADS)


@triton.jit
def _permute(heads, key, held, ROWS: tl.constexpr, BLOCK: tl.constexpr):
    """Feature d of `heads` (ROWS, BLOCK) becomes its feature key[d]."""
    feature = tl.load(key + tl.arange(0, BLOCK), held, 0)
    return tl.gather(heads, tl.broadcast_to(feature[None, :], (ROWS, BLOCK)), 1)


@triton.jit(do_not_specialize=["num_tokens", "max_position"])
def _encode_features(
    source,
    target,
    rank,
    positions,
    cos_sin_cache,
    key,
    counters,
    num_tokens,
    max_position,
    HEADS: tl.constexpr,
    KV_HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    ROTARY_DIM: tl.constexpr,
    IS_NEOX: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    width: tl.constexpr = (HEADS + 2 * KV_HEADS) * HEAD_DIM
    half: tl.constexpr = ROTARY_DIM // 2
    head = tl.program_id(1)
    feature = tl.arange(0, BLOCK)
    held = feature < HEAD_DIM
    row = (tl.program_id(0) * ROWS + tl.arange(0, ROWS)).to(tl.int64)
    in_step = row < num_tokens
    inside = in_step[:, None] & held[None, :]
    turns = in_step[:, None] & (feature < ROTARY_DIM)[None, :]
    if IS_NEOX:
        angle, is_first = feature % half, feature < half
        partner = tl.where(is_first, feature + half, feature - half)
    else:
        angle, is_first = feature // 2, feature % 2 == 0
        partner = tl.where(is_first, feature + 1, feature - 1)
    partner = tl.where(feature < ROTARY_DIM, partner, 0)
    partner = tl.broadcast_to(partner[None, :], (ROWS, BLOCK))
    position = tl.load(positions + row, in_step, 0)
    position = tl.minimum(tl.maximum(position, 0), max_position - 1)
    angles = cos_sin_cache + position[:, None] * ROTARY_DIM + angle[None, :]
    cos = tl.load(angles, turns, 1).to(tl.float32)
    sin = tl.load(angles + half, turns, 0).to(tl.float32)
    sin = tl.where(is_first, -1.0, 1.0)[None, :] * sin
    came_from = tl.load(rank + row, in_step, 0)[:, None]
    column = head * HEAD_DIM + feature[None, :]
    encoded = tl.load(source + came_from * width + column, inside, 0)
    if head < HEADS + KV_HEADS:
        own = encoded.to(tl.float32)
        other = tl.gather(encoded, partner, 1).to(tl.float32)
        turned = tl.where(turns, own * cos + other * sin, own)
        encoded = turned.to(encoded.dtype)
    own_key = key + _kv_head(head, HEADS, KV_HEADS) * HEAD_DIM
    encoded = _permute(encoded, own_key, held, ROWS, BLOCK)
    tl.store(target + row[:, None] * width + column, encoded, inside)
    if (head == 0) & (tl.program_id(0) == 0):
        tl.store(counters, tl.load(counters) + 1)
        tl.store(counters + 1, tl.load(counters + 1) + num_tokens)


@triton.jit(do_not_specialize=["num_tokens"])
def _decode_features(
    source,
    target,
    inverse_key,
    num_tokens,
    HEADS: tl.constexpr,
    KV_HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    feature = tl.arange(0, BLOCK)
    held = feature < HEAD_DIM
    row = (tl.program_id(0) * ROWS + tl.arange(0, ROWS)).to(tl.int64)[:, None]
    inside = (row < num_tokens) & held[None, :]
    head = tl.program_id(1)
    own = row * (HEADS * HEAD_DIM) + head * HEAD_DIM + feature[None, :]
    encoded = tl.load(source + own, inside, 0)
    own_key = inverse_key + _kv_head(head, HEADS, KV_HEADS) * HEAD_DIM
    tl.store(target + own, _permute(encoded, own_key, held, ROWS, BLOCK), inside)


def draw_words(key: torch.Tensor, step: torch.Tensor, num_tokens: int) -> torch.Tensor:
    """The random words of one step: int64 (num_tokens,).

    Word i is the first eight bytes, little-endian, of ChaCha20's block i under `key`,
    int32 (8,). The nonce is the first element of `step`, int64, which must never repeat
    under one key.
    """
    words = torch.empty(num_tokens, dtype=torch.int64, device=key.device)
    launch: Any = _draw_words[(triton.cdiv(num_tokens, _WORDS.value),)]
    launch(words, key, step, num_tokens, num_warps=_WARPS)
    return words


def encode_rows(
    hidden_states: torch.Tensor, key: torch.Tensor, step: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """The rows of contiguous `hidden_states` (T, H) in a fresh order pi, and its inverse.

    pi sorts the words that `draw_words` draws for T rows under `key` at `step`, within
    each group of `scx.kernels.protocol.group_of`. Its inverse is int64 (T,).
    """
    num_tokens = len(hidden_states)
    for count in _FEW_WORDS:
        if num_tokens <= count:
            # One row per program, to spread a decode batch over the accelerator.
            return _encode_rows(hidden_states, key, key, step, drawn=count, block_rows=1)
    return encode_rows_by(draw_words(key, step, num_tokens), hidden_states)


def encode_rows_by(
    words: torch.Tensor, hidden_states: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """As `encode_rows`, for `words`, int64 (T,). Equal ones keep the order of their
    rows."""
    return _encode_rows(hidden_states, words, words, words, drawn=0, block_rows=4)


def _encode_rows(
    hidden_states: torch.Tensor,
    words: torch.Tensor,
    key: torch.Tensor,
    step: torch.Tensor,
    drawn: int,
    block_rows: int,
) -> tuple[torch.Tensor, torch.Tensor]:
    num_tokens, width = hidden_states.shape
    rows = torch.empty_like(hidden_states)
    rank = torch.empty(num_tokens, dtype=torch.int64, device=rows.device)
    launch: Any = _order_rows[(triton.cdiv(num_tokens, block_rows),)]
    launch(
        hidden_states,
        rows,
        words,
        key,
        step,
        rank,
        num_tokens,
        WIDTH=width,
        DRAWN=drawn,
        ROWS=block_rows,
        num_warps=max(_WARPS, drawn // 32),
    )
    return rows, rank


def encode_features(
    qkv: torch.Tensor,
    rank: torch.Tensor,
    positions: torch.Tensor,
    cos_sin_cache: torch.Tensor,
    key: torch.Tensor,
    counters: torch.Tensor,
    num_heads: int,
    is_neox_style: bool,
) -> torch.Tensor:
    """Rows in their own order, with rotated and permuted features: (T, (N + 2M) x D).

    `qkv` is contiguous, has that shape, and is in the order of `encode_rows`, whose
    second result is `rank`. `positions` int64 (T,), `cos_sin_cache` (max_position, R) and
    `key` int32 (M, D) are as in the codec. Adds 1 and T to `counters`, int64 (2,).
    """
    target = torch.empty_like(qkv)
    kv_heads, head_dim = key.shape
    grid = (triton.cdiv(len(qkv), _FEATURE_ROWS), num_heads + 2 * kv_heads)
    launch: Any = _encode_features[grid]
    launch(
        qkv,
        target,
        rank,
        positions,
        cos_sin_cache,
        key,
        counters,
        len(qkv),
        len(cos_sin_cache),
        HEADS=num_heads,
        KV_HEADS=kv_heads,
        HEAD_DIM=head_dim,
        ROTARY_DIM=cos_sin_cache.shape[-1],
        IS_NEOX=is_neox_style,
        ROWS=_FEATURE_ROWS,
        BLOCK=triton.next_power_of_2(head_dim),
        num_warps=_FEATURE_WARPS,
        enable_fp_fusion=False,
    )
    return target


def decode_features(
    attention: torch.Tensor, inverse_key: torch.Tensor, output: torch.Tensor
) -> None:
    """Write `attention` (T, N x D) with its features in their own order to `output`.

    Both are contiguous. `inverse_key`, int32 (M, D), is the key's argsort.
    """
    kv_heads, head_dim = inverse_key.shape
    num_heads = attention.shape[-1] // head_dim
    grid = (triton.cdiv(len(attention), _FEATURE_ROWS), num_heads)
    launch: Any = _decode_features[grid]
    launch(
        attention,
        output,
        inverse_key,
        len(attention),
        HEADS=num_heads,
        KV_HEADS=kv_heads,
        HEAD_DIM=head_dim,
        ROWS=_FEATURE_ROWS,
        BLOCK=triton.next_power_of_2(head_dim),
        num_warps=_FEATURE_WARPS,
    )
