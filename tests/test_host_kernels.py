"""The host kernels against the codec, bit for bit."""

import ctypes
import itertools
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import numba
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from scx import codecs, keys
from scx.codecs import permutation, plain
from scx.codecs import rows as row_codec
from scx.codecs.affine import AffineCodec
from scx.errors import SCXError
from scx.kernels.host import affine
from scx.kernels.host import permutation as permutation_kernels
from scx.kernels.host import rows as row_kernels
from scx.kernels.host.table import host_kernels
from scx.keys import RootKey

DTYPES = (torch.bfloat16, torch.float16, torch.float32)
MAX_POSITION = 50

dtypes = st.sampled_from(DTYPES)
seeds = st.integers(0, 2**32 - 1)
few_rows = st.integers(0, 9)
examples = settings(deadline=None, max_examples=60)
each_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=str)


@st.composite
def head_shapes(draw):
    """(N, M, D)"""
    kv_heads = draw(st.integers(1, 3))
    group = draw(st.integers(1, 4))
    return kv_heads * group, kv_heads, draw(st.sampled_from([64, 80, 96, 128, 256]))


def elements(tensor):
    """The array that a kernel takes. It shares the tensor's memory."""
    halves = tensor.element_size() == 2
    return tensor.view(torch.uint16).numpy() if halves else tensor.numpy()


def bits(tensor):
    return tensor.view(torch.int16 if tensor.element_size() == 2 else torch.int32)


def assert_same_bits(result, expected):
    assert result.dtype == expected.dtype
    assert torch.equal(bits(result), bits(expected))


def poisoned(rows, columns, dtype):
    return torch.full((rows, columns), torch.nan, dtype=dtype)


def random_rows(rows, columns, dtype):
    """Values of many magnitudes, which in float16 include subnormal numbers."""
    values = torch.randn(rows, columns) * torch.exp2(torch.randint(-30, 8, (rows, 1)))
    return values.to(dtype)


def random_key(kv_heads, head_dim):
    return torch.stack([torch.randperm(head_dim) for _ in range(kv_heads)])


def random_shuffle(rows):
    """pi as the codec takes it, then pi and its rank as the kernels take them."""
    pi = torch.randperm(rows)
    return pi, pi.int().numpy(), pi.argsort().int().numpy()


def random_angles(rotary_dim):
    angles = torch.rand(MAX_POSITION, rotary_dim // 2) * 6.3
    return torch.cat([angles.cos(), angles.sin()], dim=-1)


def in_pieces(kernel, result, *arguments):
    """Call `kernel` on four ranges that make up all rows, the first of them empty.

    Each call must leave the rows of later ranges as they are.
    """
    rows = len(result)
    first = 0
    for last in (0, rows // 3, rows // 2, rows):
        kernel(*arguments, first, last)
        assert result[last:].isnan().all()
        first = last


def codec_encoding(shuffled, pi, positions, cos_sin, key, num_heads, is_neox_style):
    decoded = row_codec.decode_rows(shuffled, pi)
    kv_heads, head_dim = key.shape
    sizes = [heads * head_dim for heads in (num_heads, kv_heads, kv_heads)]
    query, keys, values = decoded.split(sizes, dim=-1)
    rotate = (positions, cos_sin, head_dim, is_neox_style)
    parts = (
        plain.apply_rotary(query, *rotate),
        plain.apply_rotary(keys, *rotate),
        values,
    )
    return torch.cat([permutation.encode_features(part, key) for part in parts], dim=-1)


@given(dtypes, few_rows, st.sampled_from([1, 7, 64, 200]), seeds)
@examples
def test_encode_rows_is_the_codecs(dtype, rows, columns, seed):
    torch.manual_seed(seed)
    source = random_rows(rows, columns, dtype)
    pi, pi_array, _ = random_shuffle(rows)
    result = poisoned(rows, columns, dtype)
    kernel = host_kernels(dtype, "permutation").encode_rows
    in_pieces(kernel, result, elements(source), elements(result), pi_array)
    assert_same_bits(result, row_codec.embeddings_pi_left(source, pi))


@given(dtypes, few_rows, head_shapes(), st.floats(0, 1), st.booleans(), seeds)
@examples
def test_encode_features_is_the_codecs(dtype, rows, shape, fraction, is_neox, seed):
    torch.manual_seed(seed)
    num_heads, kv_heads, head_dim = shape
    rotary_dim = 2 * max(1, round(fraction * head_dim / 2))
    columns = (num_heads + 2 * kv_heads) * head_dim
    source = random_rows(rows, columns, dtype)
    pi, _, rank = random_shuffle(rows)
    positions = torch.randint(MAX_POSITION, (rows,))
    cos_sin = random_angles(rotary_dim)
    key = random_key(kv_heads, head_dim)

    result = poisoned(rows, columns, dtype)
    in_pieces(
        host_kernels(dtype, "permutation").encode_features,
        result,
        *(elements(source), elements(result), rank, positions.numpy(), cos_sin.numpy()),
        *(key.numpy().astype(np.uint16), num_heads, is_neox),
    )
    expected = codec_encoding(source, pi, positions, cos_sin, key, num_heads, is_neox)
    assert_same_bits(result, expected)


@given(dtypes, few_rows, head_shapes(), seeds)
@examples
def test_decode_features_is_the_codecs(dtype, rows, shape, seed):
    torch.manual_seed(seed)
    num_heads, kv_heads, head_dim = shape
    source = random_rows(rows, num_heads * head_dim, dtype)
    key = random_key(kv_heads, head_dim)
    inverse_key = key.argsort(dim=-1).numpy().astype(np.uint16)
    result = poisoned(rows, num_heads * head_dim, dtype)
    kernel = host_kernels(dtype, "permutation").decode_features
    in_pieces(kernel, result, elements(source), elements(result), inverse_key)
    assert_same_bits(result, permutation.decode_features(source, key))


def rounding(heads, maps, expected):
    """The most by which two float32 sums of D products, each rounded once, can differ.

    In any order, a sum of D terms is off by less than D * 2^-24 of the sum of their
    magnitudes (N. Higham, Accuracy and Stability of Numerical Algorithms, section 4.2).
    """
    kv_heads, head_dim = len(maps), maps.shape[-1]
    vectors = heads.double().unflatten(-1, (kv_heads, -1, head_dim)).abs()
    magnitudes = torch.einsum("tmgd,mde->tmge", vectors, maps[:, :-1].double().abs())
    magnitudes = magnitudes + maps[:, -1:].double().abs()
    once = torch.finfo(expected.dtype)
    return (
        2 * (head_dim + 1) * 2**-24 * magnitudes.reshape(expected.shape)
        + once.eps * expected.double().abs()
        + once.smallest_normal
    )


def assert_equal_but_for_rounding(result, expected, allowed):
    assert result.dtype == expected.dtype
    assert ((result.double() - expected.double()).abs() <= allowed).all()


@given(dtypes, few_rows, head_shapes(), st.floats(0, 1), st.booleans(), seeds)
@settings(deadline=None, max_examples=30)
def test_affine_features_are_the_codecs(dtype, rows, shape, fraction, is_neox, seed):
    torch.manual_seed(seed)
    num_heads, kv_heads, head_dim = shape
    rotary_dim = 2 * max(1, round(fraction * head_dim / 2))
    sizes = [heads * head_dim for heads in (num_heads, kv_heads, kv_heads)]
    source = torch.randn(rows, sum(sizes)).to(dtype)
    pi, _, rank = random_shuffle(rows)
    positions = torch.randint(MAX_POSITION, (rows,))
    cos_sin = random_angles(rotary_dim)
    features = AffineCodec.derive(RootKey.draw(), 0, range(kv_heads), head_dim)
    encoding, decoding = features.tables
    kernels = host_kernels(dtype, "affine")

    result = poisoned(rows, sum(sizes), dtype)
    in_pieces(
        kernels.encode_features,
        result,
        *(elements(source), elements(result), rank, positions.numpy(), cos_sin.numpy()),
        *(kernels.pack(encoding), num_heads, is_neox),
    )
    q, k, v = row_codec.decode_rows(source, pi).split(sizes, dim=-1)
    rotate = (positions, cos_sin, head_dim, is_neox)
    q, k = plain.apply_rotary(q, *rotate), plain.apply_rotary(k, *rotate)
    for ours, heads, encode, maps in zip(
        result.split(sizes, dim=-1),
        (q, k, v),
        (features.encode_queries, features.encode_keys, features.encode_values),
        encoding.chunk(3),
        strict=True,
    ):
        expected = encode(heads)
        allowed = rounding(heads, maps, expected)
        assert_equal_but_for_rounding(ours, expected, allowed)

    output = poisoned(rows, sizes[0], dtype)
    arguments = elements(q.contiguous()), elements(output), kernels.pack(decoding)
    in_pieces(kernels.decode_features, output, *arguments)
    expected = features.decode_output(q)
    assert_equal_but_for_rounding(output, expected, rounding(q, decoding, expected))


@pytest.mark.parametrize("lanes", [16, 32])
def test_panels_of_any_width_of_register(lanes, monkeypatch):
    """Both widths run on any machine: LLVM splits vectors that no register holds."""
    monkeypatch.setattr(affine, "panel_lanes", lambda: lanes)
    depth, head_dim = 80, 80
    features = AffineCodec.derive(RootKey.draw(), 0, range(2), head_dim)
    _, decoding = features.tables
    packed = affine.pack(decoding)
    assert packed.shape == (2, -(-head_dim // lanes), depth + 1, lanes)
    source = torch.randn(21, 6 * head_dim)
    output = torch.empty_like(source)
    decode = affine.decode_features_kernel.__wrapped__
    monkeypatch.setattr(affine, "_map_heads", affine._map_heads.__wrapped__)
    decode(torch.float32)(source.numpy(), output.numpy(), packed, 0, len(source))
    expected = features.decode_output(source)
    allowed = rounding(source, decoding, expected)
    assert_equal_but_for_rounding(output, expected, allowed)


@pytest.mark.parametrize("is_neox", [True, False])
@each_dtype
def test_nan_and_infinity_stay(dtype, is_neox):
    """Every NaN of a bfloat16 or float16, and overflow in the rotation."""
    head_dim, rotary_dim = 64, 32
    torch.manual_seed(0)
    if dtype.itemsize == 2:
        source = torch.arange(2**16, dtype=torch.int32).to(torch.int16).view(dtype)
        source = source[torch.randperm(2**16)].view(-1, 4 * head_dim)
    else:
        source = random_rows(256, 4 * head_dim, dtype)
        source[torch.rand_like(source) < 0.2] = torch.inf
        source[torch.rand_like(source) < 0.2] = torch.nan
        source[torch.rand_like(source) < 0.2] = torch.finfo(dtype).max
    rows = len(source)
    pi, _, rank = random_shuffle(rows)
    positions = torch.randint(MAX_POSITION, (rows,))
    cos_sin = random_angles(rotary_dim)
    key = random_key(1, head_dim)

    result = torch.zeros_like(source)
    host_kernels(dtype, "permutation").encode_features(
        *(elements(source), elements(result), rank, positions.numpy(), cos_sin.numpy()),
        *(key.numpy().astype(np.uint16), 2, is_neox, 0, rows),
    )
    expected = codec_encoding(source, pi, positions, cos_sin, key, 2, is_neox)
    assert torch.equal(result.isnan(), expected.isnan())
    assert_same_bits(
        result.where(~result.isnan(), 0), expected.where(~expected.isnan(), 0)
    )


@pytest.mark.parametrize("position", [-(2**63), -1, 9, 10, 2**32, 2**63 - 1])
@pytest.mark.parametrize("codec_name", keys.CODECS)
def test_nothing_beyond_the_table_of_angles_is_read(codec_name, position):
    """Positions come from the accelerator, and memory around the table is secret."""
    head_dim, secret = 64, 1234.0
    memory = torch.full((30, head_dim), secret)
    memory[10:19] = torch.randn(9, head_dim)
    table, kernels = memory[10:19], host_kernels(torch.float32, codec_name)
    features = codecs.load(codec_name).derive(RootKey.draw(), 0, range(1), head_dim)
    key, qkv = kernels.pack(features.tables[0]), torch.randn(1, 3 * head_dim)
    results = []
    for each in (position, 0 if position < 0 else 8):
        result = torch.full_like(qkv, torch.nan)
        arguments = np.zeros(1, np.int32), np.array([each]), table.numpy(), key
        kernels.encode_features(qkv.numpy(), result.numpy(), *arguments, 1, True, 0, 1)
        results.append(result)
    assert torch.equal(*results)
    turned = plain.apply_rotary(
        qkv[:, :head_dim], torch.tensor([position]), table, head_dim, True
    )
    nearest = torch.tensor([0 if position < 0 else 8])
    expected = plain.apply_rotary(qkv[:, :head_dim], nearest, table, head_dim, True)
    assert torch.equal(turned, expected)


@each_dtype
def test_threads_share_a_step_in_compiled_code(dtype):
    rows, columns, workers = 100, 96, 4
    encode_rows = host_kernels(dtype, "permutation").encode_rows

    @numba.njit(nogil=True)
    def work(src, dst, pi, worker):
        count = len(pi)
        encode_rows(
            src, dst, pi, count * worker // workers, count * (worker + 1) // workers
        )

    source = random_rows(rows, columns, dtype)
    result = poisoned(rows, columns, dtype)
    pi, pi_array, _ = random_shuffle(rows)
    arguments = elements(source), elements(result), pi_array
    with ThreadPoolExecutor(workers) as pool:
        list(pool.map(lambda worker: work(*arguments, worker), range(workers)))
    assert_same_bits(result, row_codec.embeddings_pi_left(source, pi))


def draw(words):
    pi, rank = np.full((2, len(words)), -1, np.int32)
    host_kernels(torch.float32, "permutation").draw_permutation(words, pi, rank)
    return pi, rank


@given(st.lists(st.integers(0, 2**64 - 1) | st.sampled_from([0, 2**63, 2**64 - 1])))
@examples
def test_draw_permutation_is_fisher_yates(words):
    expected = []
    for i, word in enumerate(words):
        expected.append(i)
        j = word * (i + 1) >> 64
        expected[i], expected[j] = expected[j], expected[i]

    pi, rank = draw(np.array(words, dtype=np.uint64))
    assert pi.tolist() == expected
    assert rank[pi].tolist() == list(range(len(words)))


def test_draw_permutation_is_uniform_over_four_rows():
    """24 orders, 1000 times each: chi square with 23 degrees of freedom.

    By Chernoff's bound, (x / k * exp(1 - x / k)) ** (k / 2), it exceeds 100 with a
    probability below 1e-9.
    """
    expected = 1000
    words = np.empty((24 * expected, 4), np.uint64)
    assert host_kernels(torch.float32, "permutation").fill_random(words.reshape(-1)) == 0
    counts = dict.fromkeys(itertools.permutations(range(4)), 0)
    for four in words:
        counts[tuple(draw(four)[0].tolist())] += 1
    assert sum((count - expected) ** 2 / expected for count in counts.values()) < 100


@pytest.mark.parametrize("size", [0, 1, 3, 1000])
def test_fill_random_fills(size):
    """A word is 0, or comes twice, with a probability below 1e-12."""
    buffer = np.zeros(size + 1, np.uint64)
    fills = []
    for _ in range(2):
        assert host_kernels(torch.float32, "permutation").fill_random(buffer[:size]) == 0
        fills.extend(buffer[:size].tolist())
    assert 0 not in fills
    assert len(set(fills)) == 2 * size
    assert buffer[size] == 0


def getrandom_that(answer):
    """A stand-in for libc's: answer(size) is how many bytes it fills and returns."""
    getrandom = row_kernels.libc_getrandom()
    answer = numba.njit(answer)

    @numba.cfunc("intp(uintp, uintp, uint32)")
    def stand_in(address, size, flags):
        granted = answer(size)
        if granted > 0:
            getrandom(address, granted, flags)
        return granted

    return stand_in


@pytest.mark.parametrize(
    "answer",
    [lambda size: min(size, 7), lambda size: -1 if size > 256 else size],
    ids=["partial", "interrupted"],
)
def test_fill_random_goes_on(answer):
    stand_in = getrandom_that(answer)
    words = np.zeros(100, np.uint64)
    assert row_kernels.fill_random_kernel(stand_in.ctypes)(words) == 0
    assert words.all()


@pytest.mark.parametrize("answer", [lambda size: -1, lambda size: 0])
def test_fill_random_reports_failure(answer):
    stand_in = getrandom_that(answer)
    assert row_kernels.fill_random_kernel(stand_in.ctypes)(np.zeros(4, np.uint64)) != 0


def test_without_getrandom_the_kernels_are_refused(monkeypatch):
    monkeypatch.setattr(ctypes, "CDLL", lambda name: object())
    with pytest.raises(SCXError, match="getrandom"):
        host_kernels.__wrapped__(torch.bfloat16, "permutation")


def test_a_third_codec_brings_a_module_of_kernels(monkeypatch):
    """A codec names its module, and nothing else here knows the codecs."""

    class Third:
        encode_features_kernel = staticmethod(permutation_kernels.encode_features_kernel)
        decode_features_kernel = staticmethod(affine.decode_features_kernel)
        pack = staticmethod(affine.pack)

    monkeypatch.setitem(sys.modules, "scx.kernels.host.third", Third)
    kernels = host_kernels.__wrapped__(torch.float32, "third")
    ours = kernels.encode_features, kernels.decode_features, kernels.pack
    expected = (
        host_kernels(torch.float32, "permutation").encode_features,
        host_kernels(torch.float32, "affine").decode_features,
        affine.pack,
    )
    assert ours == expected


def test_the_numbers_of_the_protocol_load_no_torch():
    code = "import sys, scx.kernels.protocol; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0  # noqa: S603
