"""The secure device in plain torch operations: order of calls and count of traffic."""

import copy
import pickle

import pytest
import torch

from scx.codecs import permutation, plain
from scx.codecs.permutation import PermutationCodec
from scx.devices.plain import PlainSecureLayer
from scx.keys import RootKey

HEADS, KV_HEADS, HEAD_DIM, HIDDEN = 4, 2, 8, 12
WIDTH = (HEADS + 2 * KV_HEADS) * HEAD_DIM


@pytest.fixture
def layer():
    features = PermutationCodec.derive(RootKey.draw(), 0, range(KV_HEADS), HEAD_DIM)
    table = torch.randn(64, HEAD_DIM)
    secure = PlainSecureLayer(torch.device("cpu"), features, table, True, HEADS)
    return secure, features.key, table


@pytest.mark.parametrize("tokens", [0, 1, 7])
def test_a_step_is_the_codec_in_order(layer, tokens):
    secure, key, table = layer
    weight = torch.randn(HIDDEN, WIDTH)
    hidden, positions = torch.randn(tokens, HIDDEN), torch.randint(64, (tokens,))
    q, k, v = secure.encode_features(secure.encode_rows(hidden) @ weight, positions)

    # Without the row shuffle, which must have left no trace but the order of sums.
    plain_q, plain_k, plain_v = (hidden @ weight).split((32, 16, 16), dim=-1)
    for ours, heads in ((q, plain_q), (k, plain_k)):
        turned = plain.apply_rotary(heads, positions, table, HEAD_DIM, True)
        torch.testing.assert_close(ours, permutation.encode_features(turned, key))
    torch.testing.assert_close(v, permutation.encode_features(plain_v, key))
    torch.testing.assert_close(secure.features.decode_values(v), plain_v)

    output = torch.full((tokens, HEADS * HEAD_DIM), torch.nan)
    secure.decode_features(permutation.encode_features(plain_q, key), output)
    assert torch.equal(output, plain_q)


@pytest.mark.parametrize("give_away", [pickle.dumps, copy.deepcopy])
def test_a_secure_layer_gives_its_key_to_no_copy(layer, give_away):
    with pytest.raises(TypeError, match="neither copied nor pickled"):
        give_away(layer[0])


def test_traffic_is_what_crossed(layer):
    secure, *_ = layer
    tokens, steps = 5, 3
    for _ in range(steps):
        secure.encode_rows(torch.randn(tokens, HIDDEN))
        secure.encode_features(torch.randn(tokens, WIDTH), torch.arange(tokens))
        secure.decode_features(torch.randn(tokens, 32), torch.empty(tokens, 32))
    rows = 4 * tokens * (HIDDEN + WIDTH + HEADS * HEAD_DIM)
    assert secure.traffic.steps == steps
    assert secure.traffic.crossings == 6 * steps
    assert secure.traffic.bytes_out == steps * rows
    assert secure.traffic.bytes_in == steps * (rows + 8 * tokens)
