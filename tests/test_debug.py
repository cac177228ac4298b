"""What is logged: with debug each encoded layer and step, without it one line."""

import logging
import re
import secrets

import pytest

from scx.keys import RootKey, SCXConfig
from tests.engines import engine, greedy, in_new_process
from tests.tiny_models import PROMPTS


def log_lines(model):
    lines = []

    class Recorder(logging.Handler):
        def emit(self, record):
            lines.append(record.getMessage())

    # Below vLLM's own logger, whose handlers vLLM replaces while it starts.
    logging.getLogger("vllm.scx").addHandler(Recorder())
    greedy(engine(model, skip_tokenizer_init=True), PROMPTS[2:4], max_tokens=3)
    return [line for line in lines if "SCX" in line]


@pytest.fixture
def key_file(tmp_path):
    path = tmp_path / "key"
    path.touch(mode=0o600)
    path.write_bytes(secrets.token_bytes(32))
    return path


def run(model, key_file, debug):
    env = {
        "SCX_ENC_LAYERS": "1,3",
        "SCX_ENABLE_DEBUG": debug,
        "SCX_KEY_FILE": str(key_file),
        "VLLM_LOGGING_LEVEL": "INFO",
    }
    return in_new_process(log_lines, model, env=env)


def test_one_line_at_start_without_debug(tiny_llama, key_file):
    (line,) = run(tiny_llama, key_file, "False")
    fingerprint = RootKey.load(SCXConfig((1,), "cpu", True, key_file)).fingerprint
    for part in ("layers 1,3 of LlamaSCXForCausalLM", "permutation", "cpu", fingerprint):
        assert part in line


def test_each_layer_and_step_with_debug(tiny_llama, key_file):
    _, *lines = run(tiny_llama, key_file, "True")
    assert {re.match(r"SCX layer (\d)", line)[1] for line in lines} == {"1", "3"}
    # Three tokens are three steps of two layers, whatever the prefill was cut into.
    assert len(lines) >= 6
    expected = (
        r"SCX layer \d: torch.float32 on cpu, secure device cpu, hidden_states "
        r"\(\d+, 128\), 4 query and 2 KV heads of 64; step \d+, so far \d+ crossings, "
        r"\d+ bytes in, \d+ bytes out; this step \d+\.\d+ ms; key [0-9a-f]{16}"
    )
    assert all(re.fullmatch(expected, line) for line in lines)


def test_no_line_holds_the_key(tiny_llama, key_file):
    secret = key_file.read_bytes()
    text = "\n".join(run(tiny_llama, key_file, "True"))
    assert RootKey.load(SCXConfig((1,), "cpu", True, key_file)).fingerprint in text
    assert secret.hex() not in text
    assert repr(secret)[2:-1] not in text
