"""`python -m scx check` as a user runs it."""

import os
import subprocess
import sys

import pytest

from scx import __main__ as main
from tests import tiny_models


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    folder = tmp_path_factory.mktemp("check") / "model"
    return tiny_models.save_config(folder, "LlamaForCausalLM", "llama")


def check(*arguments, **variables):
    """Exit status and a dict of the lines: name of the check to (verdict, detail)."""
    done = subprocess.run(  # noqa: S603
        [sys.executable, "-m", "scx", "check", *map(str, arguments)],
        capture_output=True,
        text=True,
        env=os.environ | {"HF_HUB_OFFLINE": "1"} | variables,
    )
    lines = {}
    for line in done.stdout.splitlines():
        verdict, rest = line.split(maxsplit=1)
        name, detail = rest.split(": ", 1)
        lines[name] = (verdict, detail)
    return done.returncode, lines


def test_all_is_well():
    status, lines = check(SCX_ENC_LAYERS="0,1")
    assert status == 0
    assert {verdict for verdict, _ in lines.values()} == {"ok"}
    assert "vllm" in lines["versions"][1]
    classes = lines["model classes"][1].split(", ")
    assert {"LlamaForCausalLM", "Qwen2ForCausalLM", "TeleChat3ForCausalLM"} <= set(
        classes
    )


def test_a_vllm_outside_the_tested_range(monkeypatch, capsys):
    monkeypatch.setattr(
        main, "requires", lambda name: ["cryptography", "vllm<0.12,>=0.11"]
    )
    detail = main._versions()
    warning = capsys.readouterr().out
    assert warning.startswith("warn  versions: vllm ")
    assert warning.endswith(" is outside the range tested, <0.12,>=0.11\n")
    assert "torch" in detail


def test_a_model_that_fits(llama):
    # No tokenizer there: the check must not need one.
    status, lines = check("--model", llama, SCX_ENC_LAYERS="0,3")
    assert lines["model"] == ("ok", "LlamaForCausalLM, 4 layers, encoded [0, 3]")
    assert status == 0


def test_a_layer_that_the_model_does_not_have(llama):
    status, lines = check("--model", llama, SCX_ENC_LAYERS="0,4")
    assert status == 1
    assert lines["model"] == (
        "FAIL",
        "SCX_ENC_LAYERS='4': this model has the layers 0 to 3",
    )


def test_a_rotary_embedding_that_is_not_encoded(tmp_path):
    rope = {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}
    folder = tiny_models.save_config(
        tmp_path / "dynamic", "LlamaForCausalLM", "llama", rope_parameters=rope
    )
    status, lines = check("--model", folder, SCX_ENC_LAYERS="0")
    assert status == 1
    verdict, detail = lines["model"]
    assert verdict == "FAIL"
    assert "max_model_len=2048 goes beyond the rotary table" in detail


def test_everything_is_reported_at_once(tmp_path):
    status, lines = check("--model", tmp_path, SCX_ENC_LAYERS="x", VLLM_PLUGINS="another")
    assert status == 1
    for name in ("entry point", "configuration", "model"):
        assert lines[name][0] == "FAIL"
    assert "VLLM_PLUGINS='another'" in lines["entry point"][1]
    assert lines["configuration"][1].startswith("SCX_ENC_LAYERS='x': ")
