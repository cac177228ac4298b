"""`scx check` as a user runs it."""

import contextlib
import io
import os
import subprocess
import sys
from unittest.mock import MagicMock

import pytest
import torch

from lab import tiny_models
from lab.engines import in_new_process
from scx.commands import check
from scx.plugin import versions

BY_TORCH = "by torch operations, CUDA graphs NONE"


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    folder = tmp_path_factory.mktemp("check") / "model"
    return tiny_models.save_config(folder, "LlamaForCausalLM", "llama")


def checked(*arguments, **variables):
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


def line_of_model(folder):
    """Without the other checks, one of which takes seconds."""
    with contextlib.redirect_stdout(io.StringIO()) as said:
        passed = check._passes("model", lambda: check._model(str(folder)), {})
    return passed, said.getvalue()


def test_all_is_well(llama):
    # No tokenizer is there: the check must not need one.
    status, lines = checked("--model", llama, SCX_ENC_LAYERS="0,3", SCX_CODEC="affine")
    assert status == 0
    assert {verdict for verdict, _ in lines.values()} == {"ok"}
    assert "vllm" in lines["versions"][1]
    assert lines["host kernels"][1].startswith("affine, compiled in ")
    classes = lines["model classes"][1].split(", ")
    assert {"LlamaForCausalLM", "Qwen2ForCausalLM", "TeleChat3ForCausalLM"} <= set(
        classes
    )
    said = "LlamaForCausalLM (RoPE and softmax alone), 4 layers, encoded [0, 3]"
    assert lines["model"] == ("ok", f"{said} {BY_TORCH}")


def test_a_vllm_that_was_never_run(monkeypatch, capsys):
    monkeypatch.setattr(versions, "RUN", ("0.10", "0.11"))
    detail = check._versions()
    warning = capsys.readouterr().out
    assert warning.startswith("warn  versions: vllm ")
    assert " was never run with this package, only 0.10 to 0.11 were: " in warning
    assert "torch" in detail


def test_a_model_with_traits_and_none_that_is_encoded(tmp_path):
    folder = tiny_models.save_config(
        tmp_path / "gemma3", "Gemma3ForCausalLM", "gemma3_text", head_dim=64
    )
    traits = "RoPE that differs by layer, norms of query and key heads"
    encoded = f"Gemma3ForCausalLM ({traits}), 4 layers, encoded [0, 1, 2, 3] {BY_TORCH}"
    for layers, line in (
        ("all", encoded),
        ("", "Gemma3ForCausalLM, 4 layers, encoded none"),
    ):
        env = {"SCX_ENC_LAYERS": layers}
        assert in_new_process(line_of_model, folder, env=env) == (
            True,
            f"ok    model: {line}\n",
        )


def test_numba_is_missing(monkeypatch, capsys):
    for name in [name for name in sys.modules if name.split(".")[0] == "numba"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "numba", None)
    assert not check._passes("host kernels", check._host_kernels, {})
    line = capsys.readouterr().out
    assert line.startswith("FAIL  host kernels: numba cannot be imported (")
    assert line.endswith("(pip install -e .), and what is missing comes with it\n")


def test_a_layer_that_the_model_does_not_have(llama):
    passed, line = in_new_process(line_of_model, llama, env={"SCX_ENC_LAYERS": "0,4"})
    assert not passed
    assert line == ("FAIL  model: SCX_ENC_LAYERS='4': this model has the layers 0 to 3\n")


def test_a_rotary_embedding_that_is_not_encoded(tmp_path):
    rope = {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}
    folder = tiny_models.save_config(
        tmp_path / "dynamic", "LlamaForCausalLM", "llama", rope_parameters=rope
    )
    passed, line = in_new_process(line_of_model, folder, env={"SCX_ENC_LAYERS": "0"})
    assert not passed
    assert "max_model_len=2048 goes beyond the rotary table" in line


def test_everything_is_reported_at_once(tmp_path):
    status, lines = checked(
        "--model", tmp_path, SCX_ENC_LAYERS="x", VLLM_PLUGINS="another"
    )
    assert status == 1
    for name in ("entry point", "configuration", "model"):
        assert lines[name][0] == "FAIL"
    assert "VLLM_PLUGINS='another'" in lines["entry point"][1]
    assert lines["configuration"][1].startswith("SCX_ENC_LAYERS='x': ")
    # One reason is given once.
    assert lines["secure device"] == ("FAIL", "as configuration")


@pytest.mark.parametrize(("threads", "warns"), [("2", True), ("8", False)])
def test_few_cores_beside_a_gpu_are_a_warning(threads, warns, monkeypatch, capsys):
    monkeypatch.setenv("SCX_HOST_THREADS", threads)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    # It would pin memory, which takes a GPU.
    monkeypatch.setattr("scx.devices.host.HostDevice", MagicMock())
    assert check._passes("host kernels", check._host_kernels, {})
    said = capsys.readouterr().out
    assert ("warn  host kernels: the host's cores are the limit" in said) == warns
