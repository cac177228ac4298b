"""What encoding should cost: the formula, and measurements that it must meet."""

import json
import statistics
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from lab import tiny_models
from scx.__main__ import main
from scx.commands.estimate import Shape, layer_seconds
from scx.errors import SCXConfigError
from scx.kernels.machine import H100, Machine

RESULTS = Path(__file__).parent.parent / "benchmark_throughput" / "results"
QWEN2_7B = Shape(28, 3584, 28, 4, 128)
QWEN2_1_5B = Shape(28, 1536, 12, 2, 128)


def test_by_hand():
    # 3584 + (28 + 8) x 128 + 28 x 128 = 11,776 elements of two bytes.
    assert QWEN2_7B.row_bytes() == 23_552
    machine = Machine(10e-6, 1e-6, 2e9, 0.5e9, 2)
    # One token: two trips of a chunk. 64 tokens: 32 chunks of two rows. Positions: 8
    # bytes per token. Two workers encode half of what the bus carries.
    assert layer_seconds(QWEN2_7B, 1, machine) == pytest.approx(22e-6 + 1.6 * 23_560e-9)
    assert layer_seconds(QWEN2_7B, 64, machine) == pytest.approx(
        126e-6 + 1.6 * 64 * 23_560e-9
    )
    # 2048 tokens: 128 chunks of sixteen rows, and the first group's fill.
    assert layer_seconds(QWEN2_7B, 2048, replace(machine, workers=4)) == pytest.approx(
        3 * 138e-6 + (2048 + 0.6 * 1024) * 23_560 / 2e9
    )


def test_too_few_cores_are_said(tmp_path, capsys):
    folder = tiny_models.save_config(tmp_path / "m", "LlamaForCausalLM", "llama")
    command = ["estimate", "--model", str(folder), "--layers", "0", "--cores"]
    assert main([*command, "10"]) == 0
    assert "limit" not in capsys.readouterr().out
    assert main([*command, "4"]) == 0
    assert capsys.readouterr().out.endswith(
        "the host's cores are the limit of long steps: 3 workers encode 16 GB/s where "
        "the bus carries 40; 8 workers would not be\n"
    )
    with pytest.raises(SystemExit):
        main([*command, "0"])
    assert "'0': a whole number from 1 is allowed" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("workload", "tokens", "field"),
    [
        ("prefill", 16384, "seconds"),
        ("decode1", 1, "tpot_seconds"),
        ("decode64", 64, "tpot_seconds"),
    ],
)
def test_within_a_quarter_of_an_engine(workload, tokens, field):
    """`prefill` is one step; time per token is the time of a step. All layers, because
    what two of them add is less than what an engine varies."""
    records = (RESULTS / "qwen2-7b-h100-80468c0.jsonl").read_text().splitlines()
    seconds = {
        record["layers"]: statistics.median(np.atleast_1d(record[field]))
        for record in map(json.loads, records)
        if record["workload"] == workload
    }
    assert 28 * layer_seconds(QWEN2_7B, tokens, H100) == pytest.approx(
        seconds["all"] - seconds[""], rel=0.25
    )


@pytest.mark.parametrize("tokens", [1, 64, 1024, 16384])
@pytest.mark.parametrize(
    ("file", "shape"),
    [
        ("hops-7b-h100-80468c0.json", QWEN2_7B),
        ("hops-7b-h100-80468c0-4cores.json", QWEN2_7B),
        ("hops-h100-80468c0.json", QWEN2_1_5B),
        ("hops-h100-80468c0-4cores.json", QWEN2_1_5B),
    ],
)
def test_within_a_third_of_the_trips_alone(file, shape, tokens):
    record = json.loads((RESULTS / file).read_text())
    row = record["microseconds"][str(tokens)]
    # Of short steps it has the mean of two trips, or of three.
    measured = (
        row["trip"] * (2 if tokens == 1 else 3) if "trip" in row else sum(row.values())
    )
    machine = replace(H100, workers=record["workers"])
    assert layer_seconds(shape, tokens, machine) * 1e6 == pytest.approx(
        measured, rel=1 / 3
    )


def test_the_shape_of_a_rank(tmp_path):
    folder = tiny_models.save_config(tmp_path / "m", "LlamaForCausalLM", "llama")
    assert Shape.read(folder, 2) == Shape(4, 128, 2, 1, 32)
    # More ranks than KV heads: each holds one.
    assert Shape.read(folder, 4) == Shape(4, 128, 1, 1, 32)
    with pytest.raises(SCXConfigError, match="--tensor-parallel-size 3: 4 heads with 2"):
        Shape.read(folder, 3)
    with pytest.raises(
        SCXConfigError, match=r"no config\.json; a local folder is needed"
    ):
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


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"num_key_value_heads": None}, Shape(4, 128, 4, 4, 32)),
        ({"head_dim": None}, Shape(4, 128, 4, 2, 32)),
        ({"head_dim": 64}, Shape(4, 128, 4, 2, 64)),
        ({"text_config": None}, Shape(4, 128, 4, 2, 32)),
        (
            {"text_config": tiny_models.SHAPE | {"num_hidden_layers": 2}},
            Shape(2, 128, 4, 2, 32),
        ),
    ],
)
def test_what_may_be_null_or_nested(changes, expected, tmp_path):
    folder = tiny_models.save_config(
        tmp_path / "m", "LlamaForCausalLM", "llama", **changes
    )
    assert Shape.read(folder) == expected


SIZES = ("num_attention_heads", "num_key_value_heads", "hidden_size", "head_dim")


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        *(
            ({name: value}, f"{name}={text} in config.json: a whole number from 1 to ")
            for name in (*SIZES, "num_hidden_layers")
            for value, text in (
                (0, "0"),
                (-4, "-4"),
                (4.0, "4.0"),
                (True, "True"),
                ("4", "'4'"),
                ([4], "[4]"),
                (1 << 62, f"{1 << 62}"),
            )
        ),
        *(
            ({name: None}, f"{name}=None in config.json: a whole number")
            for name in ("num_attention_heads", "hidden_size", "num_hidden_layers")
        ),
        ({"hidden_size": 3}, "head_dim=0 in config.json: a whole number"),
        ({"num_key_value_heads": 3}, "num_key_value_heads=3 in config.json: a divisor"),
        ({"num_key_value_heads": 8}, "num_key_value_heads=8 in config.json: a divisor"),
        ({"text_config": {"hidden_size": 8}}, "num_attention_heads=None in config.json"),
        ({"hidden_size": "x" * 999}, "hidden_size='xxxxxxxxxxxx...xxxxxxxxxxxxx' in"),
    ],
)
def test_what_is_no_size_is_one_line(changes, said, tmp_path, capsys):
    folder = tiny_models.save_config(
        tmp_path / "m", "LlamaForCausalLM", "llama", **changes
    )
    assert main(["estimate", "--model", str(folder), "--layers", "all"]) == 1
    error = capsys.readouterr().err
    assert error.startswith(f"scx estimate: --model {folder}: ")
    assert said in error
    assert error.count("\n") == 1


@pytest.mark.parametrize("text", ["", "[]", "null", "7", "[" * 100_000, "\udcff"])
def test_what_is_no_config_is_one_line(text, tmp_path, capsys):
    (tmp_path / "config.json").write_text(text, errors="surrogateescape")
    assert main(["estimate", "--model", str(tmp_path), "--layers", "0"]) == 1
    error = capsys.readouterr().err
    assert f"--model {tmp_path}: config.json " in error
    assert error.count("\n") == 1


@pytest.mark.parametrize("ranks", ["0", "-1", "3", "8"])
def test_ranks_that_cannot_be(ranks, tmp_path, capsys):
    folder = tiny_models.save_config(tmp_path / "m", "LlamaForCausalLM", "llama")
    command = ["estimate", "--model", str(folder), "--layers", "0"]
    assert main([*command, "--tensor-parallel-size", ranks]) == 1
    assert capsys.readouterr().err == (
        f"scx estimate: --tensor-parallel-size {ranks}: 4 heads with 2 key/value heads "
        "cannot be split over that many ranks\n"
    )


@pytest.mark.parametrize(
    "option", ["--bus=0", "--bus=-1", "--bus=nan", "--bus=inf", "--hop=-1", "--flag=nan"]
)
def test_figures_of_a_machine_that_cannot_be(option, tmp_path, capsys):
    with pytest.raises(SystemExit) as stop:
        main(["estimate", "--model", str(tmp_path), "--layers", "0", option])
    assert stop.value.code == 2
    assert "is allowed" in capsys.readouterr().err


@pytest.mark.parametrize("architecture", ["LlamaForCausalLM", "OPTForCausalLM"])
def test_a_model_that_may_not_be_encoded_is_named(architecture, tmp_path, capsys):
    folder = tiny_models.save_config(tmp_path / "m", architecture, "llama")
    assert main(["estimate", "--model", str(folder), "--layers", "0"]) == 0
    named = f"{architecture} may not be encoded" in capsys.readouterr().out
    assert named == (architecture == "OPTForCausalLM")
