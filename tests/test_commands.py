"""The `scx` command itself: what it loads, and its small commands."""

import subprocess
import sys
from pathlib import Path

import pytest

from lab import tiny_models
from scx.__main__ import main
from scx.commands.demo_model import embedded_model

LOADED = """
import contextlib, sys
from scx.__main__ import main
with contextlib.suppress(SystemExit):
    main(sys.argv[1:])
print(*sorted({"torch", "vllm", "numba", "transformers"} & set(sys.modules)))
"""


@pytest.mark.parametrize("command", ["help", "estimate"])
def test_light_commands_load_neither_torch_nor_vllm(command, tmp_path):
    folder = tiny_models.save_config(tmp_path / "m", "LlamaForCausalLM", "llama")
    estimate = ("estimate", "--model", str(folder), "--layers", "0")
    arguments = {"help": ("--help",), "estimate": estimate}[command]
    done = subprocess.run(  # noqa: S603
        [sys.executable, "-c", LOADED, *arguments],
        capture_output=True,
        text=True,
        check=True,
    )
    *said, loaded = done.stdout.splitlines()
    assert said
    assert loaded == ""


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["check", "--model", "/nope"], "argument --model: there is no folder /nope"),
        (["audit", "--model", "./nope"], "argument --model: there is no folder ./nope"),
        (["audit", "--model", "m", "--prompts", "/x"], "argument --prompts: there is no"),
        (["estimate", "--bus", "abc"], "argument --bus: 'abc': a number above 0 is"),
        (["estimate", "--model", "m", "--layers", "x"], "argument --layers: SCX_ENC_LAY"),
        (["estimate", "--model", "m", "--layers", ""], "argument --layers: name one lay"),
        (["audit", "--model", "m", "--layers", " "], "argument --layers: name one layer"),
        (
            ["audit", "--model", "m", "--codec", "x"],
            "argument --codec: SCX_CODEC='x': o",
        ),
    ],
)
def test_an_option_is_blamed_by_its_name(options, said, capsys):
    with pytest.raises(SystemExit) as end:
        main(options)
    assert end.value.code == 2
    assert f"error: {said}" in capsys.readouterr().err


def test_the_demo_model_names_itself(capsys):
    assert main(["demo-model", "llama"]) == 0
    assert Path(capsys.readouterr().out.strip()) == embedded_model("llama")


def test_a_demo_model_that_cannot_be_made_is_one_line(monkeypatch, capsys):
    monkeypatch.setenv("XDG_CACHE_HOME", "/proc/nowhere")
    assert main(["demo-model"]) == 1
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith(
        "scx demo-model: /proc/nowhere/scx-vllm cannot be made"
    )
    assert captured.err.count("\n") == 1
