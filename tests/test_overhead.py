"""Overhead by single runs: its arithmetic on hand-made logs, and what it refuses."""

import json
import os
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path

import pytest

from benchmark_throughput import overhead
from tests.records import record

ROOT = Path(__file__).parent.parent


def log(path, made):
    path.write_text(f"12:00:00 engine built in 1.0 s\n{json.dumps(asdict(made))}\n")
    return str(path)


@pytest.fixture
def logs(tmp_path):
    """Tokens per second: plain 100, input 80, input and output 50. Four layers."""
    made = {
        "io": record("0,27@cpu", [2.0], layers="0,27", tokens_per_second=50.0),
        "plain": record("native", [1.0], tokens_per_second=100.0, ttft_seconds=0.5),
        "input": record("0@cpu", [1.25], layers="0", tokens_per_second=80.0),
        "four": record("0,1,2,3@cpu", [4.0], layers="0,1,2,3", tokens_per_second=25.0),
    }
    return {name: log(tmp_path / f"{name}.log", each) for name, each in made.items()}


def test_the_table_and_the_plot(logs, capsys, tmp_path, monkeypatch):
    pyplot = pytest.importorskip("matplotlib.pyplot")
    figures = []
    monkeypatch.setattr(pyplot, "close", figures.append)
    picture = tmp_path / "new" / "p.png"
    assert overhead.main([*logs.values(), "--plot", str(picture)]) == 0
    lines = [line for line in capsys.readouterr().out.splitlines() if "|" in line]
    cells = [[cell.strip() for cell in line.split("|")[1:-1]] for line in lines[2:]]
    assert [(row[0], row[3], row[5], row[6]) for row in cells] == [
        ("plain", "100.0", "-", "500.00"),
        ("input only", "80.0", "+25.0%", "-"),
        ("input and output", "50.0", "+100.0%", "-"),
        ("4 layers", "25.0", "+300.0%", "-"),
    ]
    assert picture.read_bytes().startswith(b"\x89PNG")
    ((axes,),) = (figure.axes for figure in figures)
    assert [bar.get_height() for bar in axes.patches] == [100.0, 80.0, 50.0, 25.0]
    labels = [text.get_text() for text in axes.texts]
    assert labels == ["", "+25.0%", "+100.0%", "+300.0%"]
    names = [label.get_text() for label in axes.get_xticklabels()]
    assert names[2] == "input and output\ncpu"


@pytest.mark.parametrize(
    ("text", "error"),
    [
        ("", "did not finish"),
        ("12:00:00 run 1: 2.0 s\n", "did not finish"),
        ('{"half": 1', "did not finish"),
    ],
)
def test_an_unfinished_log_is_refused(text, error, tmp_path, capsys):
    path = tmp_path / "x.log"
    path.write_text(text)
    with pytest.raises(SystemExit, match="2"):
        overhead.main([str(path)])
    assert error in capsys.readouterr().err


def test_nothing_is_compared_without_a_plain_run(logs, tmp_path, capsys):
    with pytest.raises(SystemExit, match="2"):
        overhead.main([logs["io"], logs["input"]])
    assert "no log of a plain run to compare 0@cpu with" in capsys.readouterr().err
    other = log(tmp_path / "other.log", record("native", [1.0], model="another"))
    with pytest.raises(SystemExit, match="2"):
        overhead.main([logs["io"], other])


def script(*arguments, name="qwen2-1.5b.py", **variables):
    return subprocess.run(  # noqa: S603
        [sys.executable, str(ROOT / "benchmark_throughput" / name), *arguments],
        capture_output=True,
        text=True,
        env=os.environ | variables,
    )


@pytest.mark.parametrize(
    ("arguments", "error"),
    [
        (["--model", "/nowhere"], "--model /nowhere"),
        (["--scx_enc_layers", "0-3"], "allowed are LAYERS"),
        (["--model", "MODEL", "--input-len", "38000"], "less than --input-len 38000"),
    ],
)
def test_what_a_script_refuses(arguments, error, tiny_qwen2):
    given = [str(tiny_qwen2) if part == "MODEL" else part for part in arguments]
    done = script(*given)
    assert done.returncode == 2
    assert error in done.stderr
    assert len(done.stderr.splitlines()) == 1


def test_a_script_ends_in_a_record(tiny_qwen2, tmp_path):
    sizes = ["--input-len", "40", "--output-len", "4", "--max-model-len", "64"]
    engine = ["--dtype", "float32", "--enforce-eager", "--gpu-memory-utilization", "0.1"]
    repeats = ["--repeat", "2", "--warmups", "0", "--scx_enc_layers", "0,3"]
    done = script("--model", str(tiny_qwen2), *sizes, *engine, *repeats)
    assert done.returncode == 0, done.stderr
    assert "random token ids" in done.stdout
    path = tmp_path / "x.log"
    path.write_text(done.stdout)
    made = overhead.read_log(path)
    assert (made.layers, made.input_tokens, made.output_tokens) == ("0,3", 40, 4)
    assert overhead.name_of(made) == "input and output"
    assert len(made.seconds) == 2
    # Two layers, two runs of 40 tokens and three steps of one, six crossings of rows
    # of 128, 256 and 128 floats; and a position a token.
    assert made.crossed_bytes == 2 * 2 * 43 * (2 * (128 + 256 + 128) * 4 + 8)


@pytest.mark.slow
def test_two_ranks_through_the_script_of_70b(tiny_llama):
    sizes = ["--input-len", "40", "--output-len", "4", "--max-model-len", "64"]
    engine = ["--dtype", "float32", "--enforce-eager", "--gpu-memory-utilization", "0.1"]
    ranks = ["--tensor-parallel-size", "2", "--repeat", "1", "--warmups", "0"]
    speeds = {}
    for layers in ("", "0,3"):
        done = script(
            *["--model", str(tiny_llama), *sizes, *engine, *ranks],
            *["--scx_enc_layers", layers],
            name="llama-70b.py",
            VLLM_CPU_OMP_THREADS_BIND="0|1",
        )
        assert done.returncode == 0, done.stderr
        speeds[layers] = json.loads(done.stdout.splitlines()[-1])
    assert speeds["0,3"]["engine_args"]["tensor_parallel_size"] == 2
    # Each rank has its own trips: all 128 columns of hidden_states, and half of the
    # heads, two query heads and a KV head of 64.
    crossed = 2 * 43 * (2 * (128 + 256 + 128) * 4 + 8)
    assert speeds["0,3"]["crossed_bytes"] == 2 * crossed
    assert speeds[""]["crossed_bytes"] is None
