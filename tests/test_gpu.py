"""Secure devices of a real GPU: the trip to the host, and the GPU itself.

All results are compared bit for bit, but for sums of the affine codec.
"""

import functools
import itertools
import math
import multiprocessing
import time
from concurrent.futures import ProcessPoolExecutor

import pytest
import torch

from scx import codecs, keys
from scx.devices.host import HostDevice, HostSecureLayer
from scx.devices.interface import Rank
from scx.kernels.host.memory import DECODE_FEATURES
from scx.keys import RootKey
from tests import secure_layers

pytestmark = pytest.mark.gpu

DTYPES = (torch.bfloat16, torch.float16, torch.float32)


@pytest.fixture(scope="module")
def devices():
    """A fused layer and a plain one with its key, each made on first use."""
    # Here, because some machines without a GPU have no Triton, and collect this file.
    from scx.devices.accelerator import AcceleratorSecureLayer

    classes = {"host": HostSecureLayer, "accelerator": AcceleratorSecureLayer}
    hosts = []

    @functools.cache
    def layers(kind, *setting):
        layer, plain = secure_layers.build(classes[kind], "cuda", *setting)
        if kind == "host":
            hosts.append(layer._host)
        return layer, plain

    yield layers
    for host in hosts:
        host.close()


def tensors(tokens, head_dim, dtype):
    return secure_layers.tensors(tokens, head_dim, dtype, "cuda")


# What can differ: the kernel by kind, its arithmetic by type and codec, its indices by
# head size and style, its cuts by the number of rows. The shapes are one row, some whose
# last block is not full, and many, these two in either style and head size. The other
# numbers of rows lie at a cut and beside it, which no type or codec moves.
CODECS, KINDS = tuple(keys.CODECS), ("host", "accelerator")
SHAPES = ((1, 64, True), (100, 80, False), (2049, 64, True))
CASES = [
    (kind, dtype, *shape[1:], codec, shape[0])
    for kind, dtype, shape, codec in itertools.product(KINDS, DTYPES, SHAPES, CODECS)
]
CASES += [
    (kind, torch.bfloat16, 80, True, "permutation", tokens)
    for kind in KINDS
    for tokens in (0, 2, 7, 8, 9, 64, 513, 6000)
]


@pytest.mark.parametrize(
    ("kind", "dtype", "head_dim", "is_neox_style", "codec", "tokens"), CASES
)
def test_a_layer_is_the_plain_layer(
    kind, dtype, head_dim, is_neox_style, codec, tokens, devices
):
    layer, plain = devices(kind, dtype, head_dim, is_neox_style, codec)
    step = tensors(tokens, head_dim, dtype)
    for _ in range(3):
        secure_layers.assert_is_plain(layer, plain, *step)


@pytest.mark.parametrize("tokens", [8, 100])
@pytest.mark.parametrize("codec", keys.CODECS)
@pytest.mark.parametrize("kind", ["host", "accelerator"])
def test_each_replay_of_a_graph_draws_a_fresh_order(kind, codec, tokens, devices):
    layer, _ = devices(kind, torch.bfloat16, 64, True, codec)
    hidden, *_ = tensors(tokens, 64, torch.bfloat16)
    output = torch.empty(
        tokens, secure_layers.HEADS * 64, dtype=torch.bfloat16, device="cuda"
    )
    qkv = torch.zeros(tokens, secure_layers.QKV_HEADS * 64, device="cuda").bfloat16()
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
        order = tuple(secure_layers.order_of(rows, hidden).tolist())
        assert sorted(order) == list(range(tokens))
        orders.add(order)
    # 4950 pairs of uniform draws from at least 8! = 40,320 orders: 0.12 repeats are
    # expected, and more than 8 have a chance below 0.13^9 / 9! = 3e-14.
    assert len(orders) >= 92


@pytest.mark.parametrize("step", [0, 1, (1 << 40) + 7])
def test_the_words_are_chacha20(step):
    secure_layers.assert_words_are_chacha20(step, "cuda")


def test_equal_words_keep_the_order_of_their_rows():
    secure_layers.assert_equal_words_keep_the_order_of_their_rows("cuda")
    secure_layers.assert_the_order_sorts_the_words(
        "cuda", (1, 9, 128, 129, 256, 257, 600, 5000)
    )


def test_no_step_number_serves_twice(devices):
    layer, _ = devices("accelerator", torch.bfloat16, 64)
    hidden, qkv, _, positions = tensors(64, 64, torch.bfloat16)
    secure_layers.assert_no_step_number_serves_twice(layer, hidden, qkv, positions)


@pytest.mark.parametrize("tokens", [1, 64, 2049])
@pytest.mark.parametrize("kind", ["host", "accelerator"])
def test_nothing_is_read_or_written_beyond_the_rows(kind, tokens, devices):
    layer, _ = devices(kind, torch.bfloat16, 80)
    step = tensors(tokens, 80, torch.bfloat16)
    secure_layers.assert_stays_within_the_rows(layer, *step)


@pytest.mark.parametrize("turn", [2**31 - 4, 2**32 - 4, 2**63 - 8], ids=hex)
def test_turns_beyond_every_width_of_a_word(turn, devices):
    layer, plain = devices("host", torch.bfloat16, 64)
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


TABLE = torch.randn(16, 8)


def small_rank(max_tokens):
    return Rank(
        num_heads=1,
        hidden_size=8,
        dtype=torch.bfloat16,
        max_tokens=max_tokens,
        is_neox_style=True,
        accelerator=torch.device("cuda"),
        secure_device=torch.device("cpu"),
        workers=5,
    )


def test_a_million_tokens_and_two_hundred_layers():
    tokens, layers, root = 2**20 + 2053, 200, RootKey.draw()
    derive = codecs.load("permutation").derive
    keys = [derive(root, i, range(1), 8) for i in range(layers)]
    host = HostDevice(keys, [TABLE] * layers, small_rank(tokens))
    rows = torch.randn(tokens, 8, device="cuda").bfloat16()
    for count in (2**20 - 1, 2**20, tokens):
        for layer in (0, 170, 171, layers - 1):
            decoded = host.exchange(rows[:count], 3 * layer + DECODE_FEATURES)
            (inverse,) = host.features[layer].tables[1]
            assert torch.equal(decoded, rows[:count, inverse.cuda()])
    host.close()


@pytest.mark.parametrize("kind", ["host", "accelerator"])
def test_positions_beyond_the_table_stay_within_it(kind, devices):
    layer, _ = devices(kind, torch.bfloat16, 64)
    hidden, qkv, *_ = tensors(8, 64, torch.bfloat16)
    secure_layers.assert_positions_stay_within_the_table(layer, hidden, qkv)


def trip_to_a_closed_host():
    """Seconds and the error of a graph's trip to workers that have ended."""
    key = codecs.load("permutation").derive(RootKey.draw(), 0, range(1), 8)
    host = HostDevice([key], [TABLE], small_rank(64))
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
