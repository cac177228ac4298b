"""The codec against an independent float64 reference.

The reference loops over tokens, heads and features in numpy and shares no code
with the codec. Moves are compared bitwise. A rotation in float32 has three
roundings of relative size 2^-24, so 4 x 2^-24 of the larger operand bounds it;
in bfloat16 and float16 the one final rounding dominates.
"""

import math
from collections import Counter

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from scx.codecs import permutation, plain, rows
from scx.keys import RootKey

ROOT = RootKey(bytes(range(32)))
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def random(*shape, dtype=torch.float32, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator).to(dtype)


def rotary_cache(max_position, rotary_dim, base=1e4):
    inverse = base ** (-np.arange(0, rotary_dim, 2) / rotary_dim)
    angles = np.arange(max_position)[:, None] * inverse
    return torch.from_numpy(np.concatenate([np.cos(angles), np.sin(angles)], 1)).float()


def reference_rotary(heads, positions, cache, head_dim, is_neox_style):
    x = heads.double().numpy().reshape(len(heads), -1, head_dim)
    out, table = x.copy(), cache.double().numpy()
    half = table.shape[1] // 2
    for t, position in enumerate(positions.tolist()):
        for head in range(x.shape[1]):
            for i in range(half):
                a, b = (i, i + half) if is_neox_style else (2 * i, 2 * i + 1)
                cos, sin = table[position, i], table[position, i + half]
                out[t, head, a] = x[t, head, a] * cos - x[t, head, b] * sin
                out[t, head, b] = x[t, head, b] * cos + x[t, head, a] * sin
    return torch.from_numpy(out.reshape(len(heads), -1))


def reference_attention(q, k, v, head_dim):
    """Causal grouped-query attention of one sequence in float64: (T, N x D)."""
    q, k, v = (
        x.double().unflatten(-1, (-1, head_dim)).transpose(0, 1) for x in (q, k, v)
    )
    group = len(q) // len(k)
    k, v = k.repeat_interleave(group, 0), v.repeat_interleave(group, 0)
    scores = q @ k.transpose(1, 2) / math.sqrt(head_dim)
    hidden = torch.ones_like(scores).triu(1).bool()
    return (
        (scores.masked_fill(hidden, -torch.inf).softmax(-1) @ v)
        .transpose(0, 1)
        .flatten(1)
    )


@given(st.integers(0, 70))
@settings(deadline=None)
def test_rows_move_as_the_permutation_says_and_back(size):
    sent = random(size, 6)
    pi = rows.draw_permutation(size)
    assert sorted(pi.tolist()) == list(range(size))
    encoded = rows.embeddings_pi_left(sent, pi)
    for i, source in enumerate(pi.tolist()):
        assert torch.equal(encoded[i], sent[source])
    assert torch.equal(rows.decode_rows(encoded, pi), sent)


def test_row_permutations_are_uniform():
    """Chi-squared over the 24 orders of 4 rows; the bound is the 1 - 1e-9 quantile."""
    draws = 24_000
    counts = Counter(tuple(rows.draw_permutation(4).tolist()) for _ in range(draws))
    expected = draws / 24
    chi_squared = sum((counts[order] - expected) ** 2 / expected for order in counts)
    assert len(counts) == 24
    assert chi_squared < 95  # 23 degrees of freedom


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("is_neox_style", [True, False])
@pytest.mark.parametrize(
    ("head_dim", "rotary_dim"), [(8, 8), (80, 80), (16, 8), (64, 32)]
)
def test_rotary_is_the_reference(head_dim, rotary_dim, is_neox_style, dtype):
    heads = random(9, 3 * head_dim, dtype=dtype)
    positions = torch.tensor([0, 1, 2, 63, 63, 5, 40, 7, 0])
    cache = rotary_cache(64, rotary_dim)
    before = heads.clone()
    ours = plain.apply_rotary(heads, positions, cache, head_dim, is_neox_style)
    theirs = reference_rotary(heads, positions, cache, head_dim, is_neox_style)
    assert ours.dtype == dtype
    assert torch.equal(heads, before)
    bound = max(4 * 2**-24, torch.finfo(dtype).eps) * heads.abs().max().item() * 2
    assert (ours.double() - theirs).abs().max() <= bound


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("heads", "kv_heads"), [(4, 4), (9, 3), (6, 1)])
def test_features_move_within_their_head_and_back(heads, kv_heads, dtype):
    head_dim = 10
    key = permutation.derive_feature_key(ROOT, 0, range(kv_heads), head_dim)
    x = random(5, heads * head_dim, dtype=dtype)
    encoded = permutation.encode_features(x, key)
    for head in range(heads):
        for d in range(head_dim):
            source = key[head // (heads // kv_heads), d]
            column = x[:, head * head_dim + source]
            assert torch.equal(encoded[:, head * head_dim + d], column)
    assert torch.equal(permutation.decode_features(encoded, key), x)


def test_feature_keys_belong_to_root_layer_and_global_head():
    key = permutation.derive_feature_key(ROOT, 3, range(4), 64)
    assert [sorted(head.tolist()) for head in key] == [list(range(64))] * 4
    assert len({tuple(head.tolist()) for head in key}) == 4
    assert torch.equal(permutation.derive_feature_key(ROOT, 3, range(2, 4), 64), key[2:])
    other_layer = permutation.derive_feature_key(ROOT, 4, range(4), 64)
    other_root = permutation.derive_feature_key(RootKey(b"x" * 32), 3, range(4), 64)
    assert not torch.equal(other_layer, key)
    assert not torch.equal(other_root, key)


def test_feature_key_does_not_change_between_versions():
    """A KV cache that was written stays readable: format 2, fixed by this vector."""
    key = permutation.derive_feature_key(ROOT, 3, [1], 8)
    assert key.tolist() == [FEATURE_KEY_V2]


FEATURE_KEY_V2 = [6, 3, 1, 0, 4, 2, 5, 7]


@pytest.mark.parametrize(("heads", "kv_heads"), [(4, 4), (9, 3), (6, 1)])
def test_attention_of_encoded_heads_is_encoded_attention(heads, kv_heads):
    """In float64, where nothing is left to tolerance but the order of sums."""
    head_dim, tokens = 16, 12
    key = permutation.derive_feature_key(ROOT, 0, range(kv_heads), head_dim)
    q = random(tokens, heads * head_dim, dtype=torch.float64, seed=1)
    k, v = (
        random(tokens, kv_heads * head_dim, dtype=torch.float64, seed=s) for s in (2, 3)
    )
    encoded = [permutation.encode_features(x, key) for x in (q, k, v)]
    through = permutation.decode_features(reference_attention(*encoded, head_dim), key)
    torch.testing.assert_close(
        through, reference_attention(q, k, v, head_dim), rtol=1e-13, atol=1e-13
    )
