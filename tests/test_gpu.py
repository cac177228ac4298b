"""Secure devices of a real GPU: the trip to the host, and the GPU itself.

Skipped where there is none. All results are compared bit for bit, but for
sums of the affine codec.
"""

import math
import multiprocessing
import struct
import time
from concurrent.futures import ProcessPoolExecutor

import pytest
import torch
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms

from scx import codecs
from scx.devices.host import HostDevice, HostSecureLayer
from scx.devices.plain import SecureLayer
from scx.kernels.host.worker import DECODE_FEATURES
from scx.keys import RootKey
from tests.agreement import assert_same

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")

HIDDEN, HEADS, KV_HEADS = 192, 6, 2
MAX_TOKENS = 6000
DTYPES = (torch.bfloat16, torch.float16, torch.float32)


@pytest.fixture(scope="module")
def devices():
    made, hosts = {}, []

    def layers(dtype, head_dim, is_neox_style=True, codec="permutation"):
        """The two layers of a GPU and a plain one, with the same keys and tables."""
        # Here, because Triton is found on machines with a GPU only.
        from scx.devices.accelerator import AcceleratorSecureLayer

        name = (dtype, head_dim, is_neox_style, codec)
        if name not in made:
            root = RootKey.draw()
            derive = codecs.load(codec).derive
            keys = [derive(root, i, range(KV_HEADS), head_dim) for i in range(2)]
            table = torch.randn(MAX_TOKENS, head_dim).to(dtype)
            host = HostDevice(
                keys,
                table,
                is_neox_style,
                HEADS,
                HIDDEN,
                MAX_TOKENS,
                dtype,
                torch.device("cuda"),
                workers=5,
            )
            arguments = keys[1], table, is_neox_style, HEADS
            made[name] = {
                "host": HostSecureLayer(host, 1),
                "accelerator": AcceleratorSecureLayer(torch.device("cuda"), *arguments),
                "plain": SecureLayer(torch.device("cpu"), *arguments),
            }
            hosts.append(host)
        return made[name]

    yield layers
    for host in hosts:
        host.close()


def tensors(tokens, head_dim, dtype):
    generator = torch.Generator("cuda").manual_seed(tokens)

    def draw(width):
        shape = (tokens, width)
        return torch.randn(shape, generator=generator, device="cuda").to(dtype)

    hidden, attention = draw(HIDDEN), draw(HEADS * head_dim)
    projection = draw((HEADS + 2 * KV_HEADS) * head_dim)
    positions = torch.randint(MAX_TOKENS, (tokens,), generator=generator, device="cuda")
    return hidden, projection, attention, positions


def order_of(rows, hidden):
    """pi with rows[i] == hidden[pi[i]], found by sorting both."""

    def ranks(x):
        return sorted(range(len(x)), key=lambda i: x[i, :4].tolist())

    pi = torch.empty(len(rows), dtype=torch.int64)
    pi[ranks(rows.cpu())] = torch.tensor(ranks(hidden.cpu()), dtype=torch.int64)
    return pi


@pytest.mark.parametrize("tokens", [0, 1, 2, 7, 8, 9, 64, 100, 513, 2049, 6000])
@pytest.mark.parametrize("head_dim", [64, 80])
@pytest.mark.parametrize("is_neox_style", [True, False], ids=["neox", "interleaved"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kind", ["host", "accelerator"])
@pytest.mark.parametrize("codec", ["permutation", "affine"])
def test_a_layer_is_the_plain_layer(
    codec, kind, dtype, is_neox_style, head_dim, tokens, devices
):
    layers = devices(dtype, head_dim, is_neox_style, codec)
    layer, plain = layers[kind], layers["plain"]
    hidden, projection, attention, positions = tensors(tokens, head_dim, dtype)
    before = layer.traffic
    for _ in range(3):
        rows = layer.encode_rows(hidden)
        pi = order_of(rows, hidden)
        assert torch.equal(rows.cpu(), hidden.cpu()[pi])
        qkv = layer.encode_features(projection[pi.cuda()], positions)
        # The plain layer has its own order, which its encode_rows would have drawn.
        plain._pi = pi
        expected = plain.encode_features(projection.cpu()[pi], positions.cpu())
        for ours, theirs in zip(qkv, expected, strict=True):
            assert_same(ours.cpu(), theirs, plain.features)
        output = torch.full_like(attention, math.nan)
        layer.decode_features(attention, output)
        expected = torch.empty_like(attention).cpu()
        plain.decode_features(attention.cpu(), expected)
        assert_same(output.cpu(), expected, plain.features)
    if tokens:
        sent = hidden.nbytes + projection.nbytes + attention.nbytes
        crossed = layer.traffic
        assert crossed.steps - before.steps == 3
        assert crossed.crossings - before.crossings == 18
        assert crossed.bytes_out - before.bytes_out == 3 * sent
        assert crossed.bytes_in - before.bytes_in == 3 * (sent + positions.nbytes)


@pytest.mark.parametrize("tokens", [8, 100])
@pytest.mark.parametrize("codec", ["permutation", "affine"])
@pytest.mark.parametrize("kind", ["host", "accelerator"])
def test_each_replay_of_a_graph_draws_a_fresh_order(kind, codec, tokens, devices):
    layer = devices(torch.bfloat16, 64, codec=codec)[kind]
    hidden, *_ = tensors(tokens, 64, torch.bfloat16)
    output = torch.empty(tokens, HEADS * 64, dtype=torch.bfloat16, device="cuda")
    qkv = torch.zeros(tokens, (HEADS + 2 * KV_HEADS) * 64, device="cuda").bfloat16()
    positions = torch.zeros(tokens, dtype=torch.int64, device="cuda")

    def step():
        rows = layer.encode_rows(hidden)
        layer.encode_features(qkv, positions)
        layer.decode_features(output, output.clone())
        return rows

    step()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        rows = step()
    orders = set()
    for _ in range(100):
        graph.replay()
        torch.cuda.synchronize()
        order = tuple(order_of(rows, hidden).tolist())
        assert sorted(order) == list(range(tokens))
        orders.add(order)
    # 4950 pairs of uniform draws from at least 8! = 40,320 orders: 0.12 repeats are
    # expected, and more than 8 have a chance below 0.13^9 / 9! = 3e-14.
    assert len(orders) >= 92


@pytest.mark.parametrize("step", [0, 1, (1 << 40) + 7])
def test_the_words_are_chacha20(step):
    from scx.kernels.cuda.secure import draw_words

    key = bytes(range(32))
    words = draw_words(
        torch.frombuffer(bytearray(key), dtype=torch.int32).cuda(),
        torch.tensor([step, 0], device="cuda"),
        600,
    )
    for block, word in enumerate(words.tolist()):
        # cryptography takes the block counter and the nonce of 12 bytes as one.
        start = struct.pack("<IQI", block, step, 0)
        cipher = Cipher(algorithms.ChaCha20(key, start), mode=None)
        stream = cipher.encryptor().update(bytes(8))
        assert struct.pack("<q", word) == stream


@pytest.mark.parametrize("tokens", [1, 64, 2049])
@pytest.mark.parametrize("kind", ["host", "accelerator"])
def test_nothing_is_read_or_written_beyond_the_rows(kind, tokens, devices):
    """Rows lie within larger tensors, whose margins are NaN and stay as they are."""
    layer = devices(torch.bfloat16, 80)[kind]
    hidden, qkv, attention, positions = tensors(tokens, 80, torch.bfloat16)

    def framed(rows):
        frame = torch.full((tokens + 128, rows.shape[1]), math.nan, device="cuda")
        frame = frame.to(rows.dtype)
        frame[64:-64] = rows
        return frame, frame[64:-64]

    (_, hidden), (_, qkv), (_, attention) = map(framed, (hidden, qkv, attention))
    frame, output = framed(torch.zeros_like(attention))
    assert torch.isfinite(layer.encode_rows(hidden)).all()
    for part in layer.encode_features(qkv, positions):
        assert torch.isfinite(part).all()
    layer.decode_features(attention, output)
    assert torch.isfinite(output).all()
    assert torch.isnan(frame[:64]).all()
    assert torch.isnan(frame[-64:]).all()


@pytest.mark.parametrize("turn", [2**31 - 4, 2**32 - 4, 2**63 - 8], ids=hex)
def test_turns_beyond_every_width_of_a_word(turn, devices):
    layers = devices(torch.bfloat16, 64)
    layer, plain = layers["host"], layers["plain"]
    *_, attention, _ = tensors(700, 64, torch.bfloat16)
    expected = torch.empty_like(attention).cpu()
    plain.decode_features(attention.cpu(), expected)
    layer._host.sequence.fill_(turn)
    for _ in range(6):
        output = torch.full_like(attention, math.nan)
        layer.decode_features(attention, output)
        assert torch.equal(output.cpu(), expected)
    assert layer._host.sequence.item() == turn + 6
    layer._host.sequence.zero_()


def test_a_million_tokens_and_two_hundred_layers():
    tokens, layers, root = 2**20 + 2053, 200, RootKey.draw()
    derive = codecs.load("permutation").derive
    keys = [derive(root, i, range(1), 8) for i in range(layers)]
    table = torch.randn(16, 8)
    rest = torch.bfloat16, torch.device("cuda"), 5
    host = HostDevice(keys, table, True, 1, 8, tokens, *rest)
    rows = torch.randn(tokens, 8, device="cuda").bfloat16()
    for count in (2**20 - 1, 2**20, tokens):
        for layer in (0, 170, 171, layers - 1):
            decoded = host.exchange(rows[:count], 3 * layer + DECODE_FEATURES)
            (inverse,) = host.features[layer].tables[1]
            assert torch.equal(decoded, rows[:count, inverse.cuda()])
    host.close()


@pytest.mark.parametrize("kind", ["host", "accelerator"])
def test_positions_beyond_the_table_stay_within_it(kind, devices):
    layer = devices(torch.bfloat16, 64)[kind]
    hidden, qkv, _, _ = tensors(8, 64, torch.bfloat16)
    qkv = qkv[:1].repeat(8, 1)
    encoded = []
    for positions in ([-1, MAX_TOKENS, -(2**62), 2**62] * 2, [0, MAX_TOKENS - 1] * 4):
        layer.encode_rows(hidden)
        at = torch.tensor(positions, device="cuda")
        encoded.append(torch.cat(layer.encode_features(qkv, at), dim=1))
    assert torch.equal(*encoded)


def trip_to_a_closed_host():
    """Seconds and the error of a graph's trip to workers that have ended."""
    key = codecs.load("permutation").derive(RootKey.draw(), 0, range(1), 8)
    rest = torch.bfloat16, torch.device("cuda"), 2
    host = HostDevice([key], torch.randn(16, 8), True, 1, 8, 64, *rest)
    rows = torch.zeros(4, 8, dtype=torch.bfloat16, device="cuda")
    host.exchange(rows, DECODE_FEATURES)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        host.exchange(rows, DECODE_FEATURES)
    graph.replay()
    torch.cuda.synchronize()
    host.close()
    start = time.monotonic()
    try:
        graph.replay()
        torch.cuda.synchronize()
    except RuntimeError as error:
        return time.monotonic() - start, str(error)
    return time.monotonic() - start, "no error"


def test_no_trip_waits_for_workers_that_have_ended():
    """In a process of its own: a kernel that traps takes the CUDA context with it."""
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, context) as pool:
        seconds, error = pool.submit(trip_to_a_closed_host).result()
    assert "CUDA error" in error
    # Without a word from the host it would be half a minute.
    assert seconds < 5
