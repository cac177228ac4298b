"""What is logged: with debug each encoded layer and step, without it one line."""

import json
import re

import pytest

from lab.engines import generate_each, in_new_process
from lab.root_keys import new_key_file, root_key
from lab.tiny_models import PROMPTS


@pytest.fixture
def key_file(tmp_path):
    return new_key_file(tmp_path / "key")


@pytest.fixture
def run(tiny_llama, key_file, tmp_path):
    """Our lines of the log that vLLM writes where its own configuration says."""
    log, configuration = tmp_path / "log", tmp_path / "logging.json"
    handler = {"class": "logging.FileHandler", "filename": str(log), "formatter": "bare"}
    settings = {
        "version": 1,
        "formatters": {"bare": {"format": "%(message)s"}},
        "handlers": {"file": handler},
        "loggers": {"vllm": {"handlers": ["file"], "level": "INFO", "propagate": False}},
    }
    configuration.write_text(json.dumps(settings))

    def lines(debug):
        env = {
            "SCX_ENC_LAYERS": "1,3",
            "SCX_ENABLE_DEBUG": debug,
            "SCX_KEY_FILE": str(key_file),
            "VLLM_LOGGING_CONFIG_PATH": str(configuration),
        }
        arguments = {"model": tiny_llama, "skip_tokenizer_init": True}
        in_new_process(generate_each, [arguments], PROMPTS[2:4], 3, env=env)
        return [line for line in log.read_text().splitlines() if line.startswith("SCX")]

    return lines


@pytest.fixture
def fingerprint(key_file, tiny_llama):
    return root_key(key_file, tiny_llama).fingerprint


def test_one_line_at_start_without_debug(run, fingerprint):
    (line,) = run("False")
    name = "layers 1,3 of LlamaSCXForCausalLM"
    for part in (name, "permutation", "cpu", fingerprint):
        assert part in line


def test_each_layer_and_step_with_debug(run, key_file, fingerprint):
    _, *lines = run("True")
    assert {re.match(r"SCX layer (\d)", line)[1] for line in lines} == {"1", "3"}
    # Three tokens are at least three steps of two layers.
    assert len(lines) >= 6
    expected = (
        r"SCX layer \d: torch.float32 on cpu, secure device cpu, hidden_states "
        r"\(\d+, 128\), 4 query and 2 KV heads of 64; step \d+, so far \d+ crossings, "
        r"\d+ bytes in, \d+ bytes out; this step \d+\.\d+ ms; key "
    ) + fingerprint
    assert all(re.fullmatch(expected, line) for line in lines)
    secret = key_file.read_bytes()
    for form in (secret.hex(), repr(secret)[2:-1]):
        assert form not in "\n".join(lines)
