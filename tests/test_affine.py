"""The affine codec: attention under it is attention, and its key is what it says."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from scx.codecs.affine import CONDITION, AffineCodec
from scx.keys import RootKey

ROOT = RootKey(bytes(range(32)))
HEAD_DIMS = [64, 80, 96, 128, 256]


def attention(q, k, v, kv_heads, head_dim):
    """Causal attention in the heads' own type, all heads of one sequence: (T, N x D)."""
    tokens = len(q)
    q, k, v = (
        x.unflatten(-1, (kv_heads, -1, head_dim)).permute(1, 2, 0, 3) for x in (q, k, v)
    )
    scores = q @ k.transpose(-1, -2) / math.sqrt(head_dim)
    hidden = torch.ones(tokens, tokens, dtype=torch.bool).triu(1)
    weights = scores.masked_fill(hidden, -math.inf).softmax(-1)
    return (weights @ v).permute(2, 0, 1, 3).flatten(1)


@settings(deadline=None, max_examples=30)
@given(
    st.integers(1, 3), st.integers(1, 3), st.sampled_from(HEAD_DIMS), st.integers(1, 9)
)
def test_attention_is_the_same_under_it(kv_heads, group, head_dim, tokens):
    torch.manual_seed(tokens)
    features = AffineCodec.derive(ROOT, 0, range(kv_heads), head_dim)
    q = torch.randn(tokens, kv_heads * group * head_dim, dtype=torch.float64)
    k, v = torch.randn(2, tokens, kv_heads * head_dim, dtype=torch.float64)
    encoded = attention(
        features.encode_queries(q),
        features.encode_keys(k),
        features.encode_values(v),
        kv_heads,
        head_dim,
    )
    decoded = features.decode_output(encoded)
    expected = attention(q, k, v, kv_heads, head_dim)
    # The maps are held in float32: 2^-24 relative in each of their D products.
    torch.testing.assert_close(decoded, expected, rtol=1e-5, atol=1e-5)
    for encode, decode, heads in (
        (features.encode_keys, features.decode_keys, k),
        (features.encode_values, features.decode_values, v),
    ):
        torch.testing.assert_close(decode(encode(heads)), heads, rtol=1e-5, atol=1e-5)
        assert (encode(heads) - heads).abs().mean() > 0.1


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_rounding_grows_by_the_condition_at_most(dtype):
    features = AffineCodec.derive(ROOT, 0, range(2), 64)
    torch.manual_seed(0)
    v = torch.randn(400, 128).to(dtype)
    back = features.decode_values(features.encode_values(v))
    assert back.dtype == dtype
    error = (back.double() - v.double()).norm() / v.double().norm()
    # Once rounded encoded and once decoded: each at most half a unit, the first one
    # stretched by the inverse map.
    assert error < (CONDITION + 1) * torch.finfo(dtype).eps / 2


@pytest.fixture
def threads():
    """Set by hand, as vLLM does it: torch's batched LU is wrong then, above D = 150."""
    number = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(number)


@pytest.mark.parametrize("head_dim", HEAD_DIMS)
@pytest.mark.usefixtures("threads")
def test_maps_are_well_conditioned_and_unlike_each_other(head_dim):
    features = AffineCodec.derive(ROOT, 1, range(3), head_dim)
    maps = [*features._key_maps[0], *features._value_maps[0]]
    inverses = [*features._key_maps[1], *features._value_maps[1]]
    for matrix, inverse in zip(maps, inverses, strict=True):
        assert torch.linalg.cond(matrix).item() == pytest.approx(CONDITION)
        one = torch.eye(head_dim, dtype=torch.float64)
        torch.testing.assert_close(matrix @ inverse, one)
    for i, first in enumerate(maps):
        for second in maps[:i]:
            # Entries of random rotations are about normal with variance 1 / D, so a
            # mean of D^2 products of two is within 6 / D^2 of 0 but for 1 in 10^9.
            assert abs((first * second).mean()) < 6 * CONDITION / head_dim**2


def test_keys_belong_to_root_layer_and_global_head():
    def maps(root, layer, heads):
        features = AffineCodec.derive(root, layer, heads, 64)
        return torch.stack([*features._key_maps, *features._value_maps])

    whole = maps(ROOT, 3, range(4))
    assert torch.equal(maps(ROOT, 3, range(4)), whole)
    # Decompositions may round otherwise in another batch.
    torch.testing.assert_close(maps(ROOT, 3, range(2, 4)), whole[:, 2:])
    for other in (maps(ROOT, 4, range(4)), maps(RootKey.draw(), 3, range(4))):
        assert (other - whole).abs().mean() > 0.05
