"""The workers of the host device, with a stand-in for the accelerator's kernel.

The stand-in does in numpy what `scx.kernels.cuda.exchange` does on a GPU: write rows
and positions, raise the flags, wait for the answer. The kernel
itself is tested in test_gpu.py.
"""

import itertools
import logging
import time

import numba
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lab.agreement import assert_same
from scx import codecs
from scx.devices import host as host_device
from scx.devices import watchdog
from scx.devices.host import HostDevice, HostSecureLayer
from scx.devices.interface import Rank
from scx.devices.plain import PlainSecureLayer
from scx.errors import SCXSecureDeviceError, SCXUnsupportedError
from scx.kernels.host import worker as host_worker
from scx.kernels.host.llvm import load_acquire, store_release
from scx.kernels.host.memory import (
    CLAIMS,
    DECODE_FEATURES,
    ENCODE_FEATURES,
    ENCODE_ROWS,
    TRIP_CHUNKS,
)
from scx.kernels.host.table import host_kernels
from scx.kernels.host.waiting import spin
from scx.kernels.protocol import (
    FLAG_STRIDE,
    FORSAKEN,
    GROUP_CHUNKS,
    GROUP_ROWS,
    LIMIT,
    MAX_CHUNK_ROWS,
    ROWS_BITS,
    SLOTS,
    chunk_rows_of,
    group_of,
    require_within_limits,
    staging_rows,
)
from scx.keys import RootKey

HIDDEN, HEADS, KV_HEADS, HEAD_DIM = 24, 4, 2, 8
MAX_TOKENS = (SLOTS + 2) * GROUP_ROWS - 100


class StandIn:
    """The accelerator's side of one host device."""

    def __init__(self, host, turn=0):
        self.host, self.turn = host, turn

    def ring(self, hop, tokens):
        box, self.turn = self.host.mailbox, self.turn + 1
        box.request[0] = hop << ROWS_BITS | tokens
        box.ready[0] = self.turn

    def exchange(self, rows, hop, positions=None):
        """The groups of a step, as many at a time as the staging memory holds."""
        box, (tokens, width) = self.host.mailbox, rows.shape
        chunk_rows, answers, on_their_way = chunk_rows_of(tokens), [], []
        groups = sorted({group_of(row, tokens) for row in range(tokens)})
        for begin, end, place in groups:
            if len(on_their_way) == SLOTS:
                answers.append(self.receive(*on_their_way.pop(0)))
            box.outbox[place * width : (place + end - begin) * width] = float("nan")
            box.inbox[place * width : (place + end - begin) * width] = rows[
                begin:end
            ].flatten()
            if positions is not None:
                box.positions[place : place + end - begin] = positions[begin:end]
            first, last = begin // chunk_rows, -(-end // chunk_rows)
            flags = slice(first * FLAG_STRIDE, last * FLAG_STRIDE, FLAG_STRIDE)
            if begin == 0:
                box.ready[flags][1:] = self.turn + 1
                self.ring(hop, tokens)
            else:
                box.ready[flags] = self.turn
            on_their_way.append((flags, place, end - begin, width))
        answers += [self.receive(*group) for group in on_their_way]
        return torch.cat(answers)

    def receive(self, flags, place, rows, width):
        box, deadline = self.host.mailbox, time.monotonic() + 20
        while not (box.done[flags] == self.turn).all():
            assert time.monotonic() < deadline, "the workers did not answer"
            assert not (box.done == FORSAKEN).any(), self.host.workers.failure
        answers = box.outbox[place * width : (place + rows) * width]
        return answers.reshape(rows, width).clone()


@pytest.fixture
def device(request):
    dtype, codec = getattr(request, "param", (torch.bfloat16, "permutation"))
    root = RootKey.draw()
    derive = codecs.load(codec).derive
    keys = [derive(root, i, range(KV_HEADS), HEAD_DIM) for i in (0, 1)]
    tables = [torch.randn(rows, HEAD_DIM).to(dtype) for rows in (MAX_TOKENS, 1)]
    rank = Rank(
        num_heads=HEADS,
        hidden_size=HIDDEN,
        dtype=dtype,
        max_tokens=MAX_TOKENS,
        is_neox_style=True,
        accelerator=torch.device("cpu"),
        secure_device=torch.device("cpu"),
        workers=3,
    )
    host = HostDevice(keys, tables, rank)
    plain = PlainSecureLayer.build(keys, tables, rank)
    yield host, plain, dtype
    host.close()


@pytest.mark.parametrize(
    "device",
    [
        (torch.float32, "permutation"),
        (torch.bfloat16, "permutation"),
        (torch.float16, "permutation"),
        (torch.float32, "affine"),
        (torch.bfloat16, "affine"),
    ],
    ids=lambda param: f"{param[0]}-{param[1]}",
    indirect=True,
)
@pytest.mark.parametrize("tokens", [1, 2, 7, 9, 64, 700, MAX_TOKENS])
def test_hops_are_the_codec(tokens, device):
    host, plain, dtype = device
    accelerator = StandIn(host)
    for step in range(3):
        for slot in (0, 1):
            torch.manual_seed(step)
            hidden = torch.randn(tokens, HIDDEN, dtype=dtype)
            # Two columns that name the row, exact in every type.
            hidden[:, 0] = torch.arange(tokens) % 64
            hidden[:, 1] = torch.arange(tokens) // 64
            rows = accelerator.exchange(hidden, 3 * slot + ENCODE_ROWS)
            pi = (rows[:, 0] + 64 * rows[:, 1].to(torch.float32)).long()
            assert sorted(pi.tolist()) == list(range(tokens))
            assert torch.equal(rows, hidden[pi])
            # Within groups, and in an order of their own in each of them.
            groups = torch.tensor([group_of(row, tokens)[0] for row in range(tokens)])
            assert torch.equal(groups[pi], groups)
            if tokens >= 64:
                assert not torch.equal(pi, torch.arange(tokens))

            qkv = torch.randn(tokens, (HEADS + 2 * KV_HEADS) * HEAD_DIM, dtype=dtype)
            positions = torch.randint(MAX_TOKENS, (tokens,))
            encoded = accelerator.exchange(qkv[pi], 3 * slot + ENCODE_FEATURES, positions)
            plain[slot]._pi = pi
            expected = torch.cat(plain[slot].encode_features(qkv[pi], positions), dim=1)
            assert_same(encoded, expected, plain[slot].features)

            attention = torch.randn(tokens, HEADS * HEAD_DIM, dtype=dtype)
            decoded = accelerator.exchange(attention, 3 * slot + DECODE_FEATURES)
            expected = torch.empty_like(attention)
            plain[slot].decode_features(attention, expected)
            assert_same(decoded, expected, plain[slot].features)
            assert HostSecureLayer(host, slot).traffic.steps == step + 1


def test_a_single_row_is_not_sent_for_its_order(device):
    host, plain, dtype = device
    accelerator, layer = StandIn(host), HostSecureLayer(host, 0)
    hidden = torch.randn(1, HIDDEN, dtype=dtype)
    assert layer.encode_rows(hidden) is hidden
    qkv = torch.randn(1, (HEADS + 2 * KV_HEADS) * HEAD_DIM).to(dtype)
    positions = torch.tensor([3])
    encoded = accelerator.exchange(qkv, ENCODE_FEATURES, positions)
    plain[0]._pi = torch.zeros(1, dtype=torch.int64)
    expected = torch.cat(plain[0].encode_features(qkv, positions), dim=1)
    assert_same(encoded, expected, plain[0].features)
    assert (layer.traffic.steps, layer.traffic.crossings) == (1, 2)


def test_each_step_draws_a_fresh_order(device):
    host, _, dtype = device
    accelerator = StandIn(host)
    hidden = torch.arange(8).to(dtype)[:, None].repeat(1, HIDDEN)
    orders = set()
    for _ in range(100):
        rows = accelerator.exchange(hidden, ENCODE_ROWS)
        accelerator.exchange(
            torch.zeros(8, 64, dtype=dtype), ENCODE_FEATURES, torch.zeros(8).long()
        )
        accelerator.exchange(torch.zeros(8, 32, dtype=dtype), DECODE_FEATURES)
        orders.add(tuple(rows[:, 0].long().tolist()))
    # 4950 pairs of draws from 8! orders: 0.12 repeats are expected, and more than 8
    # have a chance below 0.13^9 / 9! = 3e-14.
    assert len(orders) >= 92


def test_traffic_counts_bytes_of_both_directions(device):
    host, _, dtype = device
    accelerator = StandIn(host)
    hidden = torch.zeros(5, HIDDEN, dtype=dtype)
    accelerator.exchange(hidden, ENCODE_ROWS)
    accelerator.exchange(hidden, ENCODE_ROWS)
    traffic = HostSecureLayer(host, 0).traffic
    assert (traffic.steps, traffic.crossings) == (0, 4)
    assert traffic.bytes_in == traffic.bytes_out == 2 * hidden.nbytes
    qkv = torch.zeros(5, (HEADS + 2 * KV_HEADS) * HEAD_DIM, dtype=dtype)
    positions = torch.arange(5)
    accelerator.exchange(qkv, ENCODE_FEATURES, positions)
    traffic = HostSecureLayer(host, 0).traffic
    assert traffic.steps == 1
    assert traffic.bytes_out == 2 * hidden.nbytes + qkv.nbytes
    assert traffic.bytes_in == traffic.bytes_out + positions.nbytes
    # The last hop's time is counted after its answer, the others' before.
    assert 0 < traffic.secure_seconds < 1


def test_a_step_longer_than_the_staging_memory_is_refused(device):
    host, _, dtype = device
    with pytest.raises(SCXSecureDeviceError, match="longer than the"):
        host.exchange(torch.zeros(MAX_TOKENS + 1, HIDDEN, dtype=dtype), ENCODE_ROWS)


def test_closing_ends_the_workers(device):
    host, *_ = device
    host.close()
    assert not any(thread.is_alive() for thread in host.workers.threads)
    assert np.all(host.counters == 0)


# Boundaries of the protocol.


@pytest.mark.parametrize("turn", [2**31 - 3, 2**32 - 3, 2**63 - 10], ids=hex)
def test_turns_beyond_every_width_of_a_word(turn, device):
    """The last is 292,000 years of trips of a microsecond away."""
    host, plain, dtype = device
    accelerator = StandIn(host, turn)
    attention = torch.randn(700, HEADS * HEAD_DIM).to(dtype)
    expected = torch.empty_like(attention)
    plain[0].decode_features(attention, expected)
    for _ in range(8):
        assert torch.equal(accelerator.exchange(attention, DECODE_FEATURES), expected)


TABLE = torch.randn(16, 8, generator=torch.Generator().manual_seed(0)).bfloat16()


def small_rank(max_tokens=64, workers=2):
    return Rank(
        num_heads=1,
        hidden_size=8,
        dtype=torch.bfloat16,
        max_tokens=max_tokens,
        is_neox_style=True,
        accelerator=torch.device("cpu"),
        secure_device=torch.device("cpu"),
        workers=workers,
    )


def small_host(layers=1, max_tokens=64, workers=2):
    root, derive = RootKey.draw(), codecs.load("permutation").derive
    keys = [derive(root, layer, range(1), 8) for layer in range(layers)]
    return HostDevice(keys, [TABLE] * layers, small_rank(max_tokens, workers))


@pytest.fixture
def small():
    host = small_host()
    yield host
    host.close()


@pytest.mark.parametrize("tokens", [2**20 - 1, 2**20, 2**20 + GROUP_ROWS + 5])
def test_steps_beyond_a_million_tokens(tokens):
    host = small_host(max_tokens=tokens)
    rows = torch.arange(tokens * 8).reshape(tokens, 8).to(torch.int16)
    rows = rows.view(torch.bfloat16)
    decoded = StandIn(host).exchange(rows, DECODE_FEATURES)
    (inverse,) = host.features[0].tables[1]
    assert torch.equal(decoded.view(torch.int16), rows[:, inverse].view(torch.int16))
    host.close()


def test_hops_of_more_layers_than_nine_bits_name():
    host = small_host(layers=200)
    accelerator = StandIn(host)
    rows = torch.randn(64, 8).bfloat16()
    for layer in (0, 170, 171, 199):
        decoded = accelerator.exchange(rows, 3 * layer + DECODE_FEATURES)
        (inverse,) = host.features[layer].tables[1]
        assert torch.equal(decoded, rows[:, inverse])
    host.close()


def test_what_the_protocol_cannot_say_is_refused_by_name():
    with pytest.raises(SCXUnsupportedError, match=f"^max_num_batched_tokens={LIMIT}: "):
        small_host(max_tokens=LIMIT)
    with pytest.raises(SCXUnsupportedError, match="encode fewer layers"):
        require_within_limits(64, LIMIT)
    require_within_limits(LIMIT - 1, LIMIT - 1)


@settings(deadline=None, max_examples=50)
@given(st.integers(1, 20_000) | st.sampled_from([2**20 + 1, LIMIT - 1]))
def test_groups_are_of_one_size(tokens):
    chunks = -(-tokens // MAX_CHUNK_ROWS)
    groups = set()
    for chunk in {*range(min(chunks, 1400)), chunks - 1}:
        first, last = MAX_CHUNK_ROWS * chunk, MAX_CHUNK_ROWS * (chunk + 1) - 1
        begin, end, place = group_of(first, tokens)
        assert begin <= first < end <= tokens
        assert group_of(min(last, tokens - 1), tokens) == (begin, end, place)
        assert begin % MAX_CHUNK_ROWS == 0
        assert end - begin <= GROUP_ROWS
        # The last chunk may be a single row.
        if tokens > GROUP_ROWS:
            assert end - begin > GROUP_ROWS // 2 - MAX_CHUNK_ROWS
        groups.add((begin, end, place))
    # One begins where another ends, and takes the next place.
    if chunks <= 1400:
        begins, ends, places = zip(*sorted(groups), strict=True)
        assert begins == (0, *ends[:-1])
        assert ends[-1] == tokens
        slots = itertools.cycle(range(0, SLOTS * GROUP_ROWS, GROUP_ROWS))
        assert list(places) == [next(slots) for _ in places]
        assert max(places) + GROUP_ROWS <= staging_rows(tokens) or tokens < GROUP_ROWS


def test_the_last_rows_of_a_long_step_move(device):
    host, _, dtype = device
    accelerator = StandIn(host)
    hidden = torch.zeros(GROUP_ROWS + 1, HIDDEN, dtype=dtype)
    hidden[-1] = 1
    places = set()
    for _ in range(3):
        rows = accelerator.exchange(hidden, ENCODE_ROWS)
        places.add(int(rows[:, 0].argmax()))
    # The second group has 513 rows, so each is the last with a chance of 1 / 513.
    assert places != {GROUP_ROWS}


# Steps and trips that are cut off.


def test_an_abandoned_step_takes_its_order_with_it(device):
    host, _, dtype = device
    accelerator = StandIn(host)
    hidden = torch.arange(64).to(dtype)[:, None].repeat(1, HIDDEN)
    # A whole step, after which the words of the next one are drawn ahead.
    whole = accelerator.exchange(hidden, ENCODE_ROWS)
    qkv = torch.zeros(64, (HEADS + 2 * KV_HEADS) * HEAD_DIM, dtype=dtype)
    accelerator.exchange(qkv, ENCODE_FEATURES, torch.arange(64))
    accelerator.exchange(qkv[:, : HEADS * HEAD_DIM].contiguous(), DECODE_FEATURES)
    orders = {tuple(whole[:, 0].tolist())} | {
        tuple(accelerator.exchange(hidden, ENCODE_ROWS)[:, 0].tolist()) for _ in range(3)
    }
    # Two of them are equal with a chance of 6 / 64!.
    assert len(orders) == 4


def test_a_plain_layers_order_serves_one_step(device):
    _, (layer, _), dtype = device
    qkv = torch.randn(3, (HEADS + 2 * KV_HEADS) * HEAD_DIM).to(dtype)
    layer.encode_rows(torch.randn(3, HIDDEN).to(dtype))
    layer.encode_features(qkv, torch.arange(3))
    with pytest.raises(SCXSecureDeviceError, match="without encode_rows"):
        layer.encode_features(qkv, torch.arange(3))


def ended(host, seconds=20):
    """Wait until all workers have ended by themselves."""
    for thread in host.workers.threads:
        thread.join(seconds)
    return not any(thread.is_alive() for thread in host.workers.threads)


def assert_forsaken(host, reason):
    """All that a user of the device sees says why, and no kernel would wait for it."""
    layer = HostSecureLayer(host, 0)
    assert reason in layer.failure
    assert (host.mailbox.done[::FLAG_STRIDE] == FORSAKEN).all()
    with pytest.raises(SCXSecureDeviceError, match=f"cpu has ended: .*{reason}"):
        layer.encode_rows(torch.zeros(4, 8, dtype=torch.bfloat16))


@pytest.fixture
def log(caplog, monkeypatch):
    monkeypatch.setattr(logging.getLogger("vllm"), "propagate", True)
    return caplog


def test_a_trip_that_is_cut_off_ends_the_workers(log, monkeypatch):
    monkeypatch.setattr(host_device, "PATIENCE_NAPS", 100)
    host = small_host()
    StandIn(host).ring(ENCODE_ROWS, 4)
    assert ended(host)
    assert_forsaken(host, "did not come")
    assert [record.levelname for record in log.records] == ["ERROR"]
    assert "its kernel was cut off" in log.messages[0]


def until(condition):
    deadline = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.001)


def test_the_watchdog_sees_a_trip_of_the_host(log):
    host = small_host(layers=2)
    layers = {i + 7: HostSecureLayer(host, i) for i in range(2)}
    accelerator = StandIn(host)
    accelerator.ring(3 + DECODE_FEATURES, 4)

    def is_reported():
        watchdog._report(layers, patience=0.01)
        return log.messages

    until(is_reported)
    start = "SCX layer 8: the secure device cpu has not answered"
    assert all(message.startswith(start) for message in log.messages)
    # The other chunks arrive.
    host.mailbox.ready[FLAG_STRIDE::FLAG_STRIDE] = accelerator.turn
    until(lambda: all(layer.busy_since is None for layer in layers.values()))
    host.close()


@pytest.fixture
def helped(monkeypatch):
    """A host whose worker 1 gets chunk 1 of a long trip, and what it meets there:
    gates[0] is 1 once it is there, gates[1] ends it, with an exception if it is 2."""
    real = host_kernels(torch.bfloat16, "permutation").decode_features
    gates = np.zeros(2, np.int64)
    there, way_out = gates.ctypes.data, gates.ctypes.data + 8

    @numba.njit
    def decode(src, dst, key, first, last):
        while src[first, 0] == 1 and load_acquire(there) == 0:
            spin(1000)
        if src[first, 0] == 2:
            store_release(there, 1)
            while load_acquire(way_out) == 0:
                spin(1000)
            if load_acquire(way_out) == 2:
                raise MemoryError
        real(src, dst, key, first, last)

    def planted(dtype, features):
        return host_kernels(dtype, features)._replace(decode_features=decode)

    monkeypatch.setattr(host_worker, "host_kernels", planted)
    for name in ("_leading", "_chunk_server", "worker_loop"):
        monkeypatch.setattr(host_worker, name, getattr(host_worker, name).__wrapped__)
    tokens = SLOTS * GROUP_ROWS
    host = small_host(max_tokens=tokens)
    rows = host.mailbox.inbox.view(torch.int16)[: 8 * tokens].reshape(tokens, 8)
    rows[:MAX_CHUNK_ROWS], rows[MAX_CHUNK_ROWS : 2 * MAX_CHUNK_ROWS] = 1, 2
    host.mailbox.ready[FLAG_STRIDE::FLAG_STRIDE] = 1
    StandIn(host).ring(DECODE_FEATURES, tokens)
    until(lambda: gates[0] == 1)
    yield host, gates
    gates[1] = 1
    host.close()


def test_a_trip_is_not_over_before_its_last_chunk(helped):
    host, gates = helped
    chunks = SLOTS * GROUP_CHUNKS
    done = host.mailbox.done[: chunks * FLAG_STRIDE : FLAG_STRIDE]
    until(lambda: done.sum() == chunks - 1)
    time.sleep(0.1)
    assert HostSecureLayer(host, 0).busy_since is not None
    gates[1] = 1
    until(lambda: HostSecureLayer(host, 0).busy_since is None)
    assert done.sum() == chunks


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_an_exception_in_a_worker_ends_them_all(helped, log):
    host, gates = helped
    gates[1] = 2
    assert ended(host)
    assert_forsaken(host, "ended by an exception")
    assert [record.levelname for record in log.records] == ["ERROR"]


def test_no_chunk_of_another_turn_is_claimed():
    host = small_host()
    host.close()
    own = host.workers._own

    @numba.njit
    def claim(own, turn):
        return host_worker._claim(own, turn)

    own.trip[TRIP_CHUNKS] = 4
    own.control[CLAIMS] = 5 << 32 | 2
    assert [claim(own, turn) for turn in (4, 6, 5, 5, 5)] == [-1, -1, 2, 3, -1]


def test_workers_sleep_until_a_trip_needs_them(device):
    host, _, dtype = device
    own, accelerator = host.workers._own, StandIn(host)

    def all_asleep():
        return (own.asleep[1:, 0] == 1).all()

    # One row is worker 0's alone, and wakes nobody.
    until(all_asleep)
    accelerator.exchange(torch.zeros(1, HIDDEN, dtype=dtype), ENCODE_ROWS)
    assert all_asleep()
    assert own.served[:, 0].tolist() == [1, 0, 0]
    # Worker 0 may serve a long trip before the others are awake, but not always.
    hidden = torch.zeros(MAX_TOKENS, HIDDEN, dtype=dtype)

    def all_serve():
        accelerator.exchange(hidden, ENCODE_ROWS)
        return (own.served[:, 0] > 1).all()

    until(all_serve)
    until(all_asleep)
    host.close()
    assert ended(host, seconds=0)


def test_closing_does_not_wait_for_a_trip_that_is_cut_off(small):
    StandIn(small).ring(ENCODE_ROWS, 4)
    time.sleep(0.1)
    start = time.monotonic()
    small.close()
    assert time.monotonic() - start < host_device.CLOSING_SECONDS
    assert ended(small, seconds=0)
    assert_forsaken(small, "it was closed")


@pytest.mark.parametrize("hop", [ENCODE_ROWS, DECODE_FEATURES])
def test_no_randomness_ends_the_workers(hop, log, monkeypatch):
    """Before a step's rows leave, or where the next step's words are drawn ahead."""

    @numba.njit
    def fill_random(words):
        return 1

    def failing(dtype, features):
        return host_kernels(dtype, features)._replace(fill_random=fill_random)

    monkeypatch.setattr(host_worker, "host_kernels", failing)
    monkeypatch.setattr(host_worker, "_leading", host_worker._leading.__wrapped__)
    loop = host_worker.worker_loop.__wrapped__
    monkeypatch.setattr(host_worker, "worker_loop", loop)
    host = small_host()
    host.mailbox.ready[FLAG_STRIDE::FLAG_STRIDE] = 1
    StandIn(host).ring(hop, 4)
    assert ended(host)
    assert_forsaken(host, "randomness")
    assert [record.levelname for record in log.records] == ["ERROR"]


BAD = {
    "no rows": [(ENCODE_ROWS, 0)],
    "more rows than the staging holds": [(ENCODE_ROWS, 65)],
    "rows beyond 32 bits": [(ENCODE_ROWS, 2**32 - 1)],
    "no such hop": [(3, 4)],
    "a negative hop": [(-1, 4)],
    "features without rows": [(ENCODE_FEATURES, 4)],
    "features of fewer rows": [(ENCODE_ROWS, 4), (ENCODE_FEATURES, 3)],
    "features twice": [(ENCODE_ROWS, 4), (ENCODE_FEATURES, 4), (ENCODE_FEATURES, 4)],
    "features after all": [(ENCODE_ROWS, 4), (DECODE_FEATURES, 4), (ENCODE_FEATURES, 4)],
}


@pytest.mark.parametrize("case", BAD)
def test_a_request_that_no_step_makes_ends_the_workers(case):
    """The accelerator is not trusted: what it asks for is checked before it is used."""
    host = small_host()
    accelerator = StandIn(host)
    *before, (hop, tokens) = BAD[case]
    widths = {ENCODE_ROWS: 8, ENCODE_FEATURES: 24, DECODE_FEATURES: 8}
    for earlier, rows in before:
        accelerator.exchange(torch.zeros(rows, widths[earlier]).bfloat16(), earlier)
    host.mailbox.ready[FLAG_STRIDE::FLAG_STRIDE] = accelerator.turn + 1
    accelerator.ring(hop, tokens)
    assert ended(host)
    assert_forsaken(host, "no step makes")


@pytest.mark.parametrize("position", [-1, -(2**62), 16, 2**62])
def test_positions_beyond_the_table_stay_within_it(position, small):
    accelerator, (features,) = StandIn(small), small.features
    nearest = 0 if position < 0 else 15
    (plain,) = PlainSecureLayer.build([features], [TABLE], small_rank())
    qkv = torch.randn(4, 24).bfloat16()
    results = []
    for positions in (torch.full((4,), position), torch.full((4,), nearest)):
        # Equal rows: their order does not matter.
        accelerator.exchange(torch.zeros(4, 8).bfloat16(), ENCODE_ROWS)
        same = qkv[:1].repeat(4, 1)
        results.append(accelerator.exchange(same, ENCODE_FEATURES, positions))
        plain.encode_rows(torch.zeros(4, 8))
        expected = torch.cat(plain.encode_features(same, positions), dim=1)
        assert torch.equal(results[-1], expected)
    assert torch.equal(*results)


def test_whatever_the_accelerator_writes_the_workers_serve_and_end():
    """Random words in all that it maps, while trips are served and then as a request."""
    host = small_host(layers=2)
    generator = np.random.default_rng(0)
    accelerator, box = StandIn(host), host.mailbox
    for trip in range(300):
        hop, tokens = 3 * (trip // 3 % 2) + trip % 3, 1 + trip // 3 % 64
        flags = slice(FLAG_STRIDE, FLAG_STRIDE * tokens, FLAG_STRIDE)
        box.ready[flags] = accelerator.turn + 1
        accelerator.ring(hop, tokens)
        deadline = time.monotonic() + 20
        chunks = -(-tokens // chunk_rows_of(tokens))
        done = box.done[: chunks * FLAG_STRIDE : FLAG_STRIDE]
        while not (done == accelerator.turn).all():
            assert time.monotonic() < deadline, host.workers.failure
            words = generator.integers(-(2**63), 2**63 - 1, 64)
            box.positions.copy_(torch.from_numpy(words))
            box.inbox.view(torch.int16).random_()
            if box.done[0] == accelerator.turn:
                box.request[0] = int(words[0])
    assert host.counters[:, 1].sum() == 600
    box.request[0] = -(2**40) - 12345
    box.ready[0] = accelerator.turn + 1
    assert ended(host)
    assert_forsaken(host, "no step makes")
