"""What encoding should cost: the formula, and measurements that it must meet."""

import json
import statistics
from pathlib import Path

import pytest

from scx.__main__ import main
from scx.errors import SCXConfigError
from scx.estimate import H100, Machine, Shape, layer_seconds
from tests import tiny_models

RESULTS = Path(__file__).parent.parent / "benchmark_throughput" / "results"
QWEN2_7B = Shape(28, 3584, 28, 4, 128)
LLAMA_3_8B = Shape(32, 4096, 32, 8, 128)


def test_by_hand():
    # 3584 + (28 + 8) x 128 + 28 x 128 = 11,776 elements of two bytes.
    assert QWEN2_7B.row_bytes() == 23_552
    machine = Machine(10e-6, 1e-6, 1e9)
    # One token: a chunk. 64 tokens: 32 chunks of two rows. Positions: 8 bytes a token.
    assert layer_seconds(QWEN2_7B, 1, machine) == pytest.approx(33e-6 + 23_560e-9)
    assert layer_seconds(QWEN2_7B, 64, machine) == pytest.approx(126e-6 + 64 * 23_560e-9)


def median_difference(file, workload, seconds):
    """Seconds that two encoded layers add, native and encoded run side by side."""
    records = map(json.loads, (RESULTS / file).read_text().splitlines())
    native, encoded = (r for r in records if r["workload"] == workload)
    assert (native["layers"], len(encoded["layers"].split(","))) == ("", 2)
    return statistics.median(seconds(encoded)) - statistics.median(seconds(native))


@pytest.mark.parametrize(
    ("file", "shape"),
    [
        ("qwen2-7b-h100-bb60128.jsonl", QWEN2_7B),
        ("llama-3-8b-h100-bb60128.jsonl", LLAMA_3_8B),
    ],
)
@pytest.mark.parametrize(
    ("workload", "tokens", "field"),
    [
        ("prefill", 16384, "seconds"),
        ("decode1", 1, "tpot_seconds"),
        ("decode64", 64, "tpot_seconds"),
    ],
)
def test_within_a_quarter_of_the_measurements(file, shape, workload, tokens, field):
    """`prefill` is one step; time per token is the time of a step."""

    def seconds(record):
        values = record[field]
        return values if isinstance(values, list) else [values]

    measured = median_difference(file, workload, seconds)
    assert 2 * layer_seconds(shape, tokens, H100) == pytest.approx(measured, rel=0.25)


def test_the_shape_of_a_rank(tmp_path):
    folder = tiny_models.save_config(tmp_path / "m", "LlamaForCausalLM", "llama")
    assert Shape.read(folder, 2) == Shape(4, 128, 2, 1, 32)
    # More ranks than KV heads: each holds one.
    assert Shape.read(folder, 4) == Shape(4, 128, 1, 1, 32)
    with pytest.raises(SCXConfigError, match="--tensor-parallel-size 3: 4 heads"):
        Shape.read(folder, 3)
    normed = tiny_models.save_config(tmp_path / "n", "Qwen3ForCausalLM", "qwen3")
    with pytest.raises(SCXConfigError, match="query and key norms run in plain torch"):
        Shape.read(normed)
    with pytest.raises(SCXConfigError, match=r"config\.json that has hidden_size"):
        Shape.read(tmp_path)


def test_the_command(tmp_path, capsys):
    folder = tiny_models.save_config(tmp_path / "m", "LlamaForCausalLM", "llama")
    command = ["estimate", "--model", str(folder), "--layers"]
    assert main([*command, "0,3"]) == 0
    assert "2 of 4 layers encoded" in capsys.readouterr().out
    assert main([*command, "0,4"]) == 1
    assert (
        "SCX_ENC_LAYERS='4': this model has the layers 0 to 3" in capsys.readouterr().err
    )
