"""Each intrinsic of scx/kernels/host/llvm.py by itself, in compiled code."""

import ast
import threading
from pathlib import Path

import numba
import numpy as np
import pytest
import torch

import scx
from scx.kernels.host import llvm

SIXTEEN_BITS = (torch.bfloat16, torch.float16)


def compiled(function):
    return numba.njit(nogil=True)(function)


def bits_of(tensor):
    """A tensor of 16-bit floats as uint16."""
    return tensor.view(torch.uint16).numpy()


def test_no_other_file_builds_on_what_numba_does_not_promise():
    inner = ("llvmlite", "numba.core", "numba.extending")
    users = set()
    for path in Path(scx.__file__).parent.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Import):
                names = [alias.name for alias in node.names]
            else:
                names = [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            # Errors are documented, and `check` shows them.
            inside = [name for name in names if name != "numba.core.errors"]
            if any(name.startswith(inner) for name in inside):
                users.add(path.name)
    assert users == {"llvm.py"}


@pytest.mark.parametrize("load", [llvm.load_acquire, llvm.load_once])
def test_a_load_is_of_all_64_bits(load):
    words = np.array([1, -(2**63), 2**62 + 5], np.int64)
    read = compiled(lambda address: load(address))
    assert [read(words.ctypes.data + 8 * i) for i in range(3)] == words.tolist()


def test_a_store_writes_its_word_and_no_other():
    words = np.array([1, 2, 3], np.int64)
    compiled(lambda address, value: llvm.store_release(address, value))(
        words.ctypes.data + 8, -(2**62)
    )
    assert words.tolist() == [1, -(2**62), 3]


def test_what_was_written_before_a_release_is_read_after_its_acquire():
    """Two threads hand over a block of 512 words 20,000 times, by one flag each way."""
    turns, size = 20_000, 512
    block, flags = np.zeros(size, np.int64), np.zeros(16, np.int64)
    there, back = flags.ctypes.data, flags.ctypes.data + 64

    @compiled
    def write(block, there, back, turns):
        for turn in range(1, turns + 1):
            for i in range(block.size):
                block[i] = turn
            llvm.store_release(there, turn)
            while llvm.load_acquire(back) != turn:
                llvm.relax()

    @compiled
    def read(block, there, back, turns):
        wrong = 0
        for turn in range(1, turns + 1):
            while llvm.load_acquire(there) != turn:
                llvm.relax()
            for i in range(block.size):
                wrong += block[i] != turn
            llvm.store_release(back, turn)
        return wrong

    for function in (write, read):
        function(block, there, back, 0)  # compiles
    other = threading.Thread(target=write, args=(block, there, back, turns))
    other.start()
    assert read(block, there, back, turns) == 0
    other.join()


def test_an_exchange_takes_place_if_the_word_is_as_expected():
    exchange = compiled(lambda at, old, new: llvm.compare_exchange(at, old, new))
    word = np.array([5], np.int64)
    assert exchange(word.ctypes.data, 4, 9) == 0
    assert word.tolist() == [5]
    assert exchange(word.ctypes.data, 5, -(2**63)) == 1
    assert word.tolist() == [-(2**63)]


def test_of_threads_that_exchange_one_word_each_step_is_taken_once():
    steps, threads = 50_000, 4
    word = np.zeros(1, np.int64)

    @compiled
    def add(address, steps):
        for _ in range(steps):
            while True:
                seen = llvm.load_acquire(address)
                if llvm.compare_exchange(address, seen, seen + 1) == 1:
                    break

    add(word.ctypes.data, 0)
    others = [
        threading.Thread(target=add, args=(word.ctypes.data, steps))
        for _ in range(threads)
    ]
    for thread in others:
        thread.start()
    for thread in others:
        thread.join()
    assert word.tolist() == [threads * steps]


def test_hints_change_nothing():
    """A prefetch may name memory that nobody has: it reads nothing."""
    words = np.arange(8)
    hint = compiled(lambda address: llvm.prefetch(address) + llvm.relax())
    for address in (words.ctypes.data, words.ctypes.data + words.nbytes, 0):
        assert hint(address) == 0
    assert words.tolist() == list(range(8))


@pytest.mark.parametrize("dtype", SIXTEEN_BITS, ids=str)
def test_every_16_bit_float_widens_as_in_torch(dtype):
    widen, _ = llvm.converters(dtype)
    bits = np.arange(1 << 16, dtype=np.uint16)
    result = np.empty(bits.size, np.float32)

    @compiled
    def convert(source, target):
        for i in range(source.size):
            target[i] = widen(source[i])

    convert(bits, result)
    expected = torch.from_numpy(bits).view(dtype).float().numpy()
    same = (result.view(np.uint32) == expected.view(np.uint32)) | np.isnan(expected)
    assert same.all()
    assert (np.isnan(result) == np.isnan(expected)).all()


@pytest.mark.parametrize("dtype", SIXTEEN_BITS, ids=str)
def test_a_float32_rounds_as_in_torch(dtype):
    """Random ones of every exponent, and all that lie half way between two results."""
    _, narrow = llvm.converters(dtype)
    words = np.random.default_rng(0).integers(0, 1 << 32, 1 << 20).astype(np.uint32)
    every = torch.arange(1 << 16).to(torch.uint16).view(dtype).float()
    half_way = (every[:-1].double() + every[1:].double()).div(2).float()
    values = torch.cat([torch.from_numpy(words.view(np.float32)), every, half_way])
    # No angle is NaN, so none but the machine's and a 16-bit one comes here.
    values = values[~values.isnan()]
    result = np.empty(len(values), np.uint16)

    @compiled
    def convert(source, target):
        for i in range(source.size):
            target[i] = narrow(source[i])

    convert(values.numpy(), result)
    assert np.array_equal(result, bits_of(values.to(dtype)))


def test_float32_converts_to_itself():
    widen, narrow = llvm.converters(torch.float32)
    convert = compiled(lambda value: narrow(widen(value)))
    assert convert(np.float32(0.1)) == np.float32(0.1)


@pytest.mark.skipif(not llvm.has_head_function(), reason="needs AVX-512 for words")
@pytest.mark.parametrize("head_dim", [64, 128])
@pytest.mark.parametrize("rotated", [None, *SIXTEEN_BITS], ids=str)
def test_a_head_in_registers(head_dim, rotated):
    """Beside numpy's indexing, and torch's arithmetic before it."""
    dtype, half = rotated or torch.bfloat16, head_dim // 2
    generator = torch.Generator().manual_seed(head_dim)
    head = torch.randn(head_dim, generator=generator).to(dtype)
    cos_sin = torch.randn(head_dim, generator=generator)
    key = torch.randperm(head_dim, generator=generator).to(torch.uint16).numpy()
    expected = head
    if rotated:
        (first, second), (cos, sin) = head.float().view(2, half), cos_sin.view(2, half)
        turned = [first * cos - second * sin, second * cos + first * sin]
        expected = torch.cat(turned).to(dtype)
    function = llvm.head_function(head_dim, rotated)
    run = compiled(lambda *addresses: function(*addresses))
    result = np.zeros(head_dim, np.uint16)
    arrays = (bits_of(head), result, key, cos_sin.numpy())
    run(*(array.ctypes.data for array in arrays))
    assert np.array_equal(result, bits_of(expected)[key])


@pytest.mark.parametrize("lanes", [16, 32])
def test_a_panel_is_the_product(lanes):
    """Of integers in float32, whose sums are exact in any order."""
    depth, width = 37, 2 * lanes
    random = np.random.default_rng(lanes)
    x = random.integers(-50, 50, (llvm.VECTORS, depth)).astype(np.float32)
    w = random.integers(-50, 50, (depth + 1, lanes)).astype(np.float32)
    y = np.full((llvm.VECTORS, width), 7, np.float32)
    function = llvm.panel_function(lanes)
    run = compiled(lambda x, w, y, depth, width: function(x, w, y, depth, width))
    run(x.ctypes.data, w.ctypes.data, y.ctypes.data, depth, width)
    expected = x.astype(np.float64) @ w[:-1] + w[-1]
    assert np.array_equal(y[:, :lanes], expected)
    assert (y[:, lanes:] == 7).all()
