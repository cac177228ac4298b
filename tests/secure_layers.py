"""A fused secure layer beside the plain one: the same checks on a GPU and in Triton's
interpreter, on the CPU."""

import itertools
import math
import struct

import torch
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms

from lab.agreement import assert_same
from scx import codecs
from scx.codecs.rows import encode_rows
from scx.devices.interface import Rank
from scx.devices.plain import PlainSecureLayer
from scx.kernels.protocol import group_of
from scx.keys import RootKey

HIDDEN, HEADS, KV_HEADS = 192, 6, 2
QKV_HEADS = HEADS + 2 * KV_HEADS
MAX_TOKENS = 6000


def build(fused, device, dtype, head_dim, is_neox_style=True, codec="permutation"):
    """The two layers of a fused device class on `device`, and a plain one on the CPU with
    the keys and the table of the second."""
    root, derive = RootKey.draw(), codecs.load(codec).derive
    keys = [derive(root, i, range(KV_HEADS), head_dim) for i in range(2)]

    def rank(where):
        return Rank(
            num_heads=HEADS,
            hidden_size=HIDDEN,
            dtype=dtype,
            max_tokens=MAX_TOKENS,
            is_neox_style=is_neox_style,
            accelerator=torch.device(where),
            secure_device=torch.device("cpu"),
            workers=5,
        )

    # The first layer has a table of its own, of one row.
    tables = [torch.randn(rows, head_dim).to(dtype) for rows in (1, MAX_TOKENS)]
    layers = fused.build(keys, [table.to(device) for table in tables], rank(device))
    (plain,) = PlainSecureLayer.build(keys[1:], tables[1:], rank("cpu"))
    return layers[1], plain


def tensors(tokens, head_dim, dtype, device):
    """hidden_states, qkv, attention and positions of a step."""
    generator = torch.Generator(device).manual_seed(tokens)

    def draw(width):
        rows = torch.randn((tokens, width), generator=generator, device=device)
        return rows.to(dtype)

    hidden, attention = draw(HIDDEN), draw(HEADS * head_dim)
    qkv = draw(QKV_HEADS * head_dim)
    positions = torch.randint(MAX_TOKENS, (tokens,), generator=generator, device=device)
    return hidden, qkv, attention, positions


def order_of(rows, hidden):
    """pi with rows[i] == hidden[pi[i]], found by sorting both."""

    def ranks(x):
        return sorted(range(len(x)), key=lambda i: x[i, :4].tolist())

    pi = torch.empty(len(rows), dtype=torch.int64)
    pi[ranks(rows.cpu())] = torch.tensor(ranks(hidden.cpu()), dtype=torch.int64)
    return pi


def assert_is_plain(layer, plain, hidden, qkv, attention, positions):
    """One step of `layer` has the results of `plain`, which takes the same order, and
    counts as one step."""
    before = layer.traffic
    rows = layer.encode_rows(hidden)
    pi = order_of(rows, hidden)
    assert torch.equal(rows.cpu(), encode_rows(hidden.cpu(), pi))
    encoded = layer.encode_features(qkv[pi.to(qkv.device)], positions)
    # The plain layer has an order of its own, which its encode_rows would have drawn.
    plain._pi = pi
    expected = plain.encode_features(qkv.cpu()[pi], positions.cpu())
    for ours, theirs in zip(encoded, expected, strict=True):
        assert_same(ours.cpu(), theirs, plain.features)
    output = torch.full_like(attention, math.nan)
    layer.decode_features(attention, output)
    expected = torch.empty_like(attention).cpu()
    plain.decode_features(attention.cpu(), expected)
    assert_same(output.cpu(), expected, plain.features)
    if len(hidden):
        # The host is not asked for the order of a single row.
        trips = 3 if layer.on_accelerator or rows is not hidden else 2
        sent = qkv.nbytes + attention.nbytes + (trips == 3) * hidden.nbytes
        crossed = layer.traffic
        assert crossed.steps - before.steps == 1
        assert crossed.crossings - before.crossings == 2 * trips
        assert crossed.bytes_out - before.bytes_out == sent
        assert crossed.bytes_in - before.bytes_in == sent + positions.nbytes


def assert_stays_within_the_rows(layer, hidden, qkv, attention, positions):
    """Nothing beyond them is read or written: they lie within larger tensors, whose
    margins are NaN and stay as they are."""

    def framed(rows):
        frame = rows.new_full((len(rows) + 128, rows.shape[1]), math.nan)
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


def assert_positions_stay_within_the_table(layer, hidden, qkv):
    """Positions beyond it count as the nearest that it has. `hidden` has 8 rows."""
    qkv = qkv[:1].repeat(8, 1)
    encoded = []
    end = MAX_TOKENS
    for positions in ([-1, end, -(2**62), 2**62] * 2, [0, end - 1] * 4):
        layer.encode_rows(hidden)
        at = torch.tensor(positions, device=qkv.device)
        encoded.append(torch.cat(layer.encode_features(qkv, at), dim=1))
    assert torch.equal(*encoded)


def assert_equal_words_keep_the_order_of_their_rows(device):
    """Which words of 64 bits that were drawn would never show."""
    from scx.kernels.cuda import secure

    words = torch.randint(-3, 3, (600,), device=device)
    hidden = torch.randn(600, 8, device=device)
    rows, rank = secure.encode_rows_by(words, hidden)
    pi = words.argsort(stable=True)
    assert torch.equal(rows, hidden[pi])
    assert torch.equal(rank, pi.argsort())


def assert_the_order_sorts_the_words(device, counts):
    """Within each group, whether the kernel draws them itself, as it does for few rows,
    or not."""
    from scx.kernels.cuda import secure

    key = torch.arange(8, dtype=torch.int32, device=device)
    step = torch.tensor([3], device=device)
    for count in counts:
        words = secure.draw_words(key, step, count)
        groups = sorted({group_of(row, count)[:2] for row in range(count)})
        pi = torch.cat([begin + words[begin:end].argsort() for begin, end in groups])
        hidden = torch.randn(count, 8, device=device)
        rows, rank = secure.encode_rows(hidden, key, step)
        assert torch.equal(rows, hidden[pi])
        assert torch.equal(rank, pi.argsort())


def assert_no_step_number_serves_twice(layer, hidden, qkv, positions):
    """Not even if the step before was abandoned after its rows had left."""
    orders = [layer.encode_rows(hidden)]
    for _ in range(2):
        orders.append(layer.encode_rows(hidden))
        layer.encode_features(qkv, positions)
    for one, other in itertools.combinations(orders, 2):
        assert not torch.equal(one, other)


def assert_words_are_chacha20(step, device, count=600):
    """Those of the kernel are the keystream of the `cryptography` package."""
    from scx.kernels.cuda.secure import draw_words

    key = bytes(range(32))
    words = draw_words(
        torch.frombuffer(bytearray(key), dtype=torch.int32).to(device),
        torch.tensor([step], device=device),
        count,
    )
    for block, word in enumerate(words.tolist()):
        # cryptography takes the block counter and the nonce of 12 bytes as one.
        start = struct.pack("<IQI", block, step, 0)
        cipher = Cipher(algorithms.ChaCha20(key, start), mode=None)
        stream = cipher.encryptor().update(bytes(8))
        assert struct.pack("<q", word) == stream
