"""The workers of the host device, with a stand-in for the accelerator's kernel.

The stand-in does in numpy what `scx.kernels.exchange` does on a GPU: write rows
and positions, raise the flags, ring the bell, wait for the answer. The kernel
itself is tested in test_gpu.py.
"""

import time

import numpy as np
import pytest
import torch

from scx import codecs
from scx.errors import SCXError
from scx.host_device import HostDevice, HostSecureLayer
from scx.kernels.host_worker import (
    DECODE_FEATURES,
    ENCODE_FEATURES,
    ENCODE_ROWS,
)
from scx.kernels.protocol import GROUP_ROWS, chunk_rows_of, pack_bell
from scx.keys import RootKey
from scx.secure_device import SecureLayer
from tests.agreement import assert_same

HIDDEN, HEADS, KV_HEADS, HEAD_DIM = 24, 4, 2, 8
MAX_TOKENS = 2 * GROUP_ROWS + 100


class StandIn:
    """The accelerator's side of one host device."""

    def __init__(self, host):
        self.host, self.turn = host, 0

    def exchange(self, rows, hop, positions=None):
        box, self.turn = self.host.mailbox, self.turn + 1
        tokens, chunk = len(rows), chunk_rows_of(len(rows))
        chunks = -(-tokens // chunk)
        box.outbox.fill_(float("nan"))
        box.inbox[: rows.numel()] = rows.flatten()
        if positions is not None:
            box.positions[:tokens] = positions
        box.ready[: 8 * chunks : 8] = self.turn
        box.bell[0] = self.turn << 32 | pack_bell(hop, chunk, tokens)
        deadline = time.monotonic() + 20
        while not (box.done[: 8 * chunks : 8] == self.turn).all():
            assert time.monotonic() < deadline, "the workers did not answer"
        return box.outbox[: rows.numel()].reshape(rows.shape).clone()


@pytest.fixture
def device(request):
    dtype, codec = getattr(request, "param", (torch.bfloat16, "permutation"))
    root = RootKey.draw()
    derive = codecs.load(codec).derive
    keys = [derive(root, i, range(KV_HEADS), HEAD_DIM) for i in (0, 1)]
    table = torch.randn(MAX_TOKENS, HEAD_DIM).to(dtype)
    host = HostDevice(
        keys,
        table,
        True,
        HEADS,
        HIDDEN,
        MAX_TOKENS,
        dtype,
        torch.device("cpu"),
        workers=3,
    )
    plain = [SecureLayer(torch.device("cpu"), key, table, True, HEADS) for key in keys]
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
            assert torch.equal(pi // GROUP_ROWS, torch.arange(tokens) // GROUP_ROWS)
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
    assert (traffic.steps, traffic.crossings) == (2, 4)
    assert traffic.bytes_in == traffic.bytes_out == 2 * hidden.nbytes
    # The second hop's time is counted after its answer, the first one's before.
    assert 0 < traffic.secure_seconds < 1


def test_a_step_longer_than_the_staging_memory_is_refused(device):
    host, _, dtype = device
    with pytest.raises(SCXError, match="longer than the"):
        host.exchange(torch.zeros(MAX_TOKENS + 1, HIDDEN, dtype=dtype), ENCODE_ROWS)


def test_closing_ends_the_workers(device):
    host, *_ = device
    host.close()
    assert not any(thread.is_alive() for thread in host._threads)
    assert np.all(host.counters.numpy() == 0)
