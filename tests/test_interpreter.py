"""The accelerator's own kernels on the CPU, in Triton's interpreter.

Their maths and their indexing, with the checks that test_gpu.py makes on a GPU. What a
GPU alone can show stays there: memory order, graphs, and the kernel with inline PTX.
"""

import multiprocessing
from concurrent.futures import ProcessPoolExecutor

import pytest
import torch

from tests import secure_layers

pytest.importorskip("triton")

# bfloat16 is left out: the interpreter cuts float32 off to it where a GPU rounds to
# nearest, so half of the rotated features would be off by their last place.
DTYPES = (torch.float32, torch.float16)
# None, and a few rows of which the last program's are not all there.
SHAPES = ((0, 64, True), (1, 64, True), (7, 80, False))
CASES = [(dtype, "permutation", *shape) for dtype in DTYPES for shape in SHAPES]
CASES += [(dtype, "affine", *SHAPES[2]) for dtype in DTYPES]
# More words than one program compares at once, of one type, as programs are slow here.
CASES += [(torch.float16, "permutation", 260, 80, True)]


def check_each(cases):
    from scx.devices.accelerator import AcceleratorSecureLayer

    for dtype, codec, tokens, head_dim, is_neox_style in cases:
        layer, plain = secure_layers.build(
            AcceleratorSecureLayer, "cpu", dtype, head_dim, is_neox_style, codec
        )
        step = secure_layers.tensors(tokens, head_dim, dtype, "cpu")
        secure_layers.assert_is_plain(layer, plain, *step)
        secure_layers.assert_stays_within_the_rows(layer, *step)
    hidden, qkv, *_ = secure_layers.tensors(8, head_dim, dtype, "cpu")
    secure_layers.assert_positions_stay_within_the_table(layer, hidden, qkv)
    hidden, qkv, _, positions = secure_layers.tensors(40, head_dim, dtype, "cpu")
    secure_layers.assert_no_step_number_serves_twice(layer, hidden, qkv, positions)
    secure_layers.assert_equal_words_keep_the_order_of_their_rows("cpu")
    secure_layers.assert_the_order_sorts_the_words("cpu", (1, 3, 129, 257, 1030))
    for nonce in (1, (1 << 40) + 7):
        secure_layers.assert_words_are_chacha20(nonce, "cpu")
    return len(cases)


def test_the_kernels_are_the_codec(monkeypatch):
    # Triton reads it when it is imported, so no process that has it already will do.
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        assert pool.submit(check_each, CASES).result() == len(CASES)
