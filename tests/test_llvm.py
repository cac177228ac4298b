"""Each function of `scx.kernels.host.llvm` against numpy, torch or other threads."""

import ast
import mmap
import platform
import re
import threading
from pathlib import Path

import numba
import numpy as np
import pytest
import torch

import scx
from scx.kernels.host import llvm
from scx.kernels.host.waiting import spin

X86 = platform.machine() in ("x86_64", "AMD64")
HALVES = (torch.bfloat16, torch.float16)
each_half = pytest.mark.parametrize("dtype", HALVES, ids=str)
# A wait gives up after so many spins, most of which yield: seconds.
PATIENCE = 10_000_000


def test_one_file_builds_ir_and_leans_on_no_internals_of_numba():
    package = Path(scx.__file__).parent
    for path in package.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            names = []
            if isinstance(node, ast.Import):
                names = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom):
                names = [f"{node.module}.{alias.name}" for alias in node.names]
            for name in names:
                # Its errors are documented, and `check` shows them.
                assert not name.startswith("numba.core") or ".errors." in name, path
                if path != Path(llvm.__file__):
                    assert not name.startswith(("llvmlite", "numba.extending")), path


def test_a_pointer_is_its_address():
    @numba.njit
    def view(address, size):
        return numba.carray(llvm.pointer(address), (size,), np.int64)

    words = np.arange(10)
    middle = view(words.ctypes.data + 16, 3)
    assert middle.tolist() == [2, 3, 4]
    middle[:] = 7
    assert words.tolist() == [0, 1, 7, 7, 7, 5, 6, 7, 8, 9]


# Words that threads share.


def at(words, index=0):
    return words.ctypes.data + 8 * index


def together(*calls):
    """Run functions in threads of their own, and return their results in order."""
    results = [None] * len(calls)

    def run(index):
        results[index] = calls[index]()

    threads = [threading.Thread(target=run, args=(i,)) for i in range(len(calls))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return results


@numba.njit
def call_load_acquire(address):
    return llvm.load_acquire(address)


@numba.njit
def call_load_once(address):
    return llvm.load_once(address)


@numba.njit
def call_store_release(address, value):
    llvm.store_release(address, value)


WORDS = np.array([0, 1, -1, 2**31, 2**32, 2**63 - 1, -(2**63)])


@pytest.mark.parametrize("load", [call_load_acquire, call_load_once])
def test_loads_return_the_word_at_their_address(load):
    assert [load(at(WORDS, i)) for i in range(len(WORDS))] == WORDS.tolist()


def test_store_release_writes_one_word():
    words = np.full(len(WORDS) + 2, 7)
    for i, word in enumerate(WORDS):
        call_store_release(at(words, i + 1), word)
    assert words.tolist() == [7, *WORDS.tolist(), 7]


@numba.njit(nogil=True)
def send(data, flag, acknowledged, rounds):
    for turn in range(1, rounds + 1):
        data[:] = turn
        llvm.store_release(flag, turn)
        spins = 0
        while llvm.load_acquire(acknowledged) != turn:
            spin(spins)
            spins += 1
            if spins > PATIENCE:
                return turn
    return 0


@numba.njit(nogil=True)
def receive(data, flag, acknowledged, rounds):
    wrong = 0
    for turn in range(1, rounds + 1):
        spins = 0
        while llvm.load_acquire(flag) != turn:
            spin(spins)
            spins += 1
            if spins > PATIENCE:
                return -turn
        for value in data:
            wrong += value != turn
        llvm.store_release(acknowledged, turn)
    return wrong


@numba.njit(nogil=True)
def write_and_look(own, other, own_gate, other_gate, seen):
    """In each round write a word, and see whether the other thread has written its."""
    for turn in range(1, len(seen) + 1):
        llvm.store_release(own_gate, turn)
        spins = 0
        while llvm.load_acquire(other_gate) < turn:
            spin(spins)
            spins += 1
            if spins > PATIENCE:
                return False
        llvm.store_release(own, turn)
        llvm.fence()
        seen[turn - 1] = llvm.load_acquire(other) >= turn
    return True


def test_of_two_that_write_and_then_look_one_sees_the_other():
    # Without the fence a core looks before others can see what it wrote.
    words, seen = np.zeros(32, np.int64), np.zeros((2, 200_000), np.bool_)
    mine, theirs, gate, other_gate = (at(words, 8 * i) for i in range(4))
    assert all(
        together(
            lambda: write_and_look(mine, theirs, gate, other_gate, seen[0]),
            lambda: write_and_look(theirs, mine, other_gate, gate, seen[1]),
        )
    )
    assert seen.any(axis=0).all()


def test_what_was_written_before_a_release_is_seen_after_its_acquire():
    data, words, rounds = np.zeros(100, np.int64), np.zeros(16, np.int64), 5000
    flags = at(words), at(words, 8)
    given_up, wrong = together(
        lambda: send(data, *flags, rounds), lambda: receive(data, *flags, rounds)
    )
    assert (given_up, wrong) == (0, 0)


@numba.njit(nogil=True)
def spins_until_seen(address):
    spins = 0
    while llvm.load_once(address) == 0 and spins < PATIENCE:
        spin(spins)
        spins += 1
    return spins


def test_load_once_reads_anew_each_time_and_only_then():
    """A loop sees another thread's write, and two uses of one load are of one value."""
    words = np.ones(1, np.int64)
    call_store_release(at(words), 1)
    assert spins_until_seen(at(words)) == 0
    words[0] = 0
    threading.Timer(0.05, call_store_release, (at(words), 1)).start()
    assert 0 < spins_until_seen(at(words)) < PATIENCE

    @numba.njit("intp(intp, intp)")
    def bounded(address, bound):
        word = llvm.load_once(address)
        return min(max(word, 0), bound)

    (code,) = bounded.inspect_llvm().values()
    assert code.count("load atomic") == code.count("monotonic, align 8") == 1


@numba.njit
def call_compare_exchange(address, expected, value):
    return llvm.compare_exchange(address, expected, value)


@pytest.mark.parametrize(
    ("call", "arguments", "instruction"),
    [
        (call_load_acquire, 1, r"load atomic i64,.* acquire, align 8"),
        (call_load_once, 1, r"load atomic i64,.* monotonic, align 8"),
        (call_store_release, 2, r"store atomic i64 .* release, align 8"),
        (call_compare_exchange, 3, r"cmpxchg .* acq_rel acquire"),
    ],
)
def test_words_have_the_order_of_their_names(call, arguments, instruction):
    """x86 gives acquire and release to every access, so no thread there would notice."""
    signature = (numba.int64,) * arguments
    call.compile(signature)
    assert re.search(instruction, call.inspect_llvm(signature))


@pytest.mark.parametrize("word", WORDS)
def test_compare_exchange_writes_if_the_word_is_expected(word):
    words = np.array([7, word, 7])
    other = word ^ (1 << 40)
    assert call_compare_exchange(at(words, 1), other, 5) is False
    assert words.tolist() == [7, word, 7]
    assert call_compare_exchange(at(words, 1), word, other) is True
    assert words.tolist() == [7, other, 7]


@numba.njit(nogil=True)
def count_up(address, times):
    for _ in range(times):
        while True:
            word = llvm.load_acquire(address)
            if llvm.compare_exchange(address, word, word + 1):
                break
    return times


def test_compare_exchange_loses_no_count_of_several_threads():
    word, times, workers = np.zeros(1, np.int64), 200_000, 4
    count_up(at(word), 0)
    together(*[lambda: count_up(at(word), times)] * workers)
    assert word[0] == workers * times


# Hints.


def test_relax_is_a_pause_and_nothing_else():
    @numba.njit("int64(int64)")
    def relaxed(value):
        llvm.relax()
        return value

    assert relaxed(-5) == -5
    (code,) = relaxed.inspect_asm().values()
    instructions = [line.strip() for line in code.splitlines()]
    assert instructions.count("pause") == X86


def test_prefetch_reads_and_writes_nothing():
    """At the last byte of a buffer, and at addresses that nobody mapped: reading there
    would end the process."""

    @numba.njit("void(intp)")
    def call_prefetch(address):
        llvm.prefetch(address)

    page = mmap.mmap(-1, mmap.PAGESIZE)
    buffer = np.frombuffer(page, np.uint8)
    buffer[:] = np.arange(mmap.PAGESIZE) % 251
    before = buffer.copy()
    last = buffer.ctypes.data + mmap.PAGESIZE - 1
    for address in (last, last + 1, 0, -64, 2**47):
        call_prefetch(address)
    assert np.array_equal(buffer, before)
    (code,) = call_prefetch.inspect_asm().values()
    assert ("prefetcht0" in code) == X86


# Conversions.


def compiled_conversions(dtype):
    """The pair as functions of whole arrays, whose loops LLVM may vectorise."""
    widen, narrow = llvm.conversions(dtype)

    @numba.njit
    def widen_all(elements, values):
        for i in range(len(elements)):
            values[i] = widen(elements[i])

    @numba.njit
    def narrow_all(values, elements):
        for i in range(len(values)):
            elements[i] = narrow(values[i])

    return widen_all, narrow_all


def every_element(dtype):
    return torch.arange(2**16, dtype=torch.int32).to(torch.int16).view(dtype)


def as_uint16(tensor):
    return tensor.view(torch.uint16).numpy()


def narrowed(values, dtype):
    elements = np.zeros(len(values), np.uint16)
    compiled_conversions(dtype)[1](values, elements)
    return elements


@each_half
def test_widening_is_torchs_for_every_pattern(dtype):
    elements = every_element(dtype)
    expected, values = elements.float(), torch.zeros(2**16)
    compiled_conversions(dtype)[0](as_uint16(elements), values.numpy())
    is_nan = expected.isnan()
    assert torch.equal(values.isnan(), is_nan)
    ours, theirs = values.view(torch.int32), expected.view(torch.int32)
    assert torch.equal(ours[~is_nan], theirs[~is_nan])


@each_half
def test_narrowing_undoes_widening_for_every_pattern(dtype):
    elements = every_element(dtype)
    result = narrowed(elements.float().numpy(), dtype)
    is_nan = elements.isnan().numpy()
    assert np.array_equal(result[~is_nan], as_uint16(elements)[~is_nan])
    back = torch.from_numpy(result.view(np.int16)).view(dtype)
    assert torch.equal(back.isnan(), elements.isnan())


@each_half
def test_narrowing_rounds_as_torch_does(dtype):
    """Halfway between any two neighbours, beside that by one unit of the last place of a
    float32, and at random."""
    elements = every_element(dtype)
    finite = elements[elements.isfinite()].double().sort().values
    # Beyond the largest value: where rounding to infinity begins.
    ends = finite[-1] + (finite[-1] - finite[-2]) * torch.tensor([0.5, 1.0])
    halfway = torch.cat([(finite[1:] + finite[:-1]) / 2, ends, -ends]).float().numpy()
    patterns = np.random.default_rng(0).integers(0, 2**32, 300_000, np.uint32)
    random = patterns.view(np.float32)
    up, down = (np.nextafter(halfway, np.float32(end)) for end in (np.inf, -np.inf))
    values = np.concatenate([halfway, up, down, random[~np.isnan(random)]])
    expected = torch.from_numpy(values).to(dtype)
    assert np.array_equal(narrowed(values, dtype), as_uint16(expected))


def test_float32_is_kept():
    patterns = np.random.default_rng(0).integers(0, 2**32, 1000, np.uint32)
    for convert in compiled_conversions(torch.float32):
        result = np.zeros(1000, np.float32)
        convert(patterns.view(np.float32), result)
        assert np.array_equal(result.view(np.uint32), patterns)


# One head in AVX-512 registers.


def cpu_flags():
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    return next((line.split() for line in lines if line.startswith("flags")), [])


def test_the_cores_registers_are_known():
    assert llvm.has_head_function() == ("avx512bw" in cpu_flags())
    assert llvm.panel_lanes() == (32 if "avx512f" in cpu_flags() else 16)


needs_avx512 = pytest.mark.skipif(
    not llvm.has_head_function(), reason="this machine has no AVX512BW"
)


def compiled_head(head_dim, rotated):
    """The function for one head of uint16, which also looks at what lies around it."""
    one_head = llvm.head_function(head_dim, rotated)

    @numba.njit("void(intp, intp, intp, intp)")
    def call(src, dst, key, cos_sin):
        one_head(src, dst, key, cos_sin)

    def head_at(head, key, cos_sin):
        result, key = np.full(head_dim + 2, 12345, np.uint16), key.astype(np.uint16)
        angles = 0 if cos_sin is None else cos_sin.ctypes.data
        call(head.ctypes.data, result[1:].ctypes.data, key.ctypes.data, angles)
        assert result[0] == result[-1] == 12345
        return result[1:-1]

    return head_at


def keys(head_dim):
    """Permutations, and keys that read one feature only."""
    generator = np.random.default_rng(0)
    yield from (generator.permutation(head_dim) for _ in range(10))
    yield from (np.full(head_dim, d) for d in range(head_dim))


@needs_avx512
@pytest.mark.parametrize("head_dim", [64, 128])
def test_a_head_is_permuted_as_by_an_index(head_dim):
    permute = compiled_head(head_dim, None)
    head = np.random.default_rng(1).integers(0, 2**16, head_dim, np.uint16)
    for key in keys(head_dim):
        assert np.array_equal(permute(head, key, None), head[key])


@needs_avx512
@each_half
@pytest.mark.parametrize("head_dim", [64, 128])
def test_a_head_is_rotated_as_in_float32_and_rounded_once(head_dim, dtype):
    torch.manual_seed(0)
    encode, half = compiled_head(head_dim, dtype), head_dim // 2
    for key in keys(head_dim):
        head = torch.randn(head_dim).mul(torch.randint(1, 2**10, (head_dim,))).to(dtype)
        angle = torch.rand(half) * 6.3
        cos, sin = angle.cos(), angle.sin()
        first, second = head[:half].float(), head[half:].float()
        turned = torch.cat([first * cos - second * sin, second * cos + first * sin])
        result = encode(as_uint16(head), key, torch.cat([cos, sin]).numpy())
        assert np.array_equal(result, as_uint16(turned.to(dtype))[key])


# Vectors times a panel.


def multiplied(x, w, width):
    """What the function makes of the vectors, and the rest of the rows that it writes."""
    depth, lanes = x.shape[1], w.shape[1]
    panel = llvm.panel_function(lanes)

    @numba.njit("void(intp, intp, intp, intp, intp)")
    def call(x, w, y, depth, width):
        panel(x, w, y, depth, width)

    y = np.full((llvm.VECTORS, width), 12345, np.float32)
    call(x.ctypes.data, w.ctypes.data, y.ctypes.data, depth, width)
    return y[:, :lanes], y[:, lanes:]


@pytest.mark.parametrize("depth", [1, 2, 7, 128])
@pytest.mark.parametrize("lanes", [16, 32])
def test_a_panel_is_a_matrix_product(lanes, depth):
    """A sum of depth + 1 terms by fused steps is rounded `depth` times, each time by at
    most 2^-24 of a partial sum (N. Higham, Accuracy and Stability of Numerical
    Algorithms, section 3.1). One more time covers the second order."""
    generator = np.random.default_rng(0)
    x = generator.standard_normal((llvm.VECTORS, depth), np.float32)
    w = generator.standard_normal((depth + 1, lanes), np.float32)
    result, beside = multiplied(x, w, lanes + 5)
    exact = x.astype(np.float64) @ w[:-1].astype(np.float64) + w[-1]
    magnitudes = np.abs(x).astype(np.float64) @ np.abs(w[:-1]) + np.abs(w[-1])
    assert (np.abs(result - exact) <= (depth + 1) * 2**-24 * magnitudes).all()
    assert (beside == 12345).all()


@pytest.mark.parametrize("lanes", [16, 32])
def test_a_panel_of_whole_numbers_is_exact(lanes):
    generator = np.random.default_rng(0)
    x = generator.integers(-99, 99, (llvm.VECTORS, 80)).astype(np.float32)
    w = generator.integers(-99, 99, (81, lanes)).astype(np.float32)
    result, _ = multiplied(x, w, lanes)
    assert np.array_equal(result, x @ w[:-1] + w[-1])
