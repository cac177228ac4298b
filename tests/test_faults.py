"""What breaks ends in a clear error or goes on correctly: never plain, never a hang."""

import contextlib
import json
import logging
import os
import pwd
import resource
import signal
import subprocess
import sys
import threading
import time

import pytest
import torch

from benchmark_acc import evaluation
from benchmark_throughput.records import append_record, read_records
from lab.cli import UsageError
from lab.engines import configure_each, engine, generate_each, greedy, in_new_process
from lab.root_keys import new_key_file
from lab.tiny_models import PROMPTS
from scx.codecs.permutation import PermutationCodec
from scx.commands import demo_model as embedded
from scx.devices import watchdog
from scx.devices.plain import PlainSecureLayer
from scx.errors import SCXError
from scx.keys import RootKey
from tests.records import record

PROMPT = PROMPTS[3]


# The watchdog, on a secure device that is slow to answer.


class SlowCodec(PermutationCodec):
    """Takes as long as a test lets it."""

    def __init__(self, key):
        super().__init__(key)
        self.goes_on = threading.Event()

    def decode_output(self, heads):
        assert self.goes_on.wait(60)
        return super().decode_output(heads)


def test_the_log_says_which_layer_waits(caplog, monkeypatch):
    monkeypatch.setattr(logging.getLogger("vllm"), "propagate", True)
    features = SlowCodec(PermutationCodec.derive(RootKey.draw(), 0, range(2), 8).key)
    monkeypatch.setattr(SlowCodec, "to", lambda self, device: self)
    layers = {
        5: PlainSecureLayer(torch.device("cpu"), features, torch.randn(4, 8), True, 4),
        6: PlainSecureLayer(torch.device("cpu"), features, torch.randn(4, 8), True, 4),
    }
    watchdog.watch(layers, patience=0.05)
    (thread,) = [t for t in threading.enumerate() if t.name == "scx-watchdog"]
    call = threading.Thread(
        target=layers[5].decode_features, args=(torch.randn(3, 32), torch.empty(3, 32))
    )
    call.start()
    deadline = time.monotonic() + 60
    while not caplog.messages and time.monotonic() < deadline:
        time.sleep(0.01)
    features.goes_on.set()
    call.join()
    assert caplog.messages
    for message in caplog.messages:
        assert message.startswith(
            "SCX layer 5: the secure device cpu has not answered for"
        )
    assert layers[5].busy_since is None
    del layers, call
    thread.join(60)
    assert not thread.is_alive()


def test_a_call_that_fails_does_not_count_as_waiting():
    features = PermutationCodec.derive(RootKey.draw(), 0, range(2), 8)
    layer = PlainSecureLayer(torch.device("cpu"), features, torch.randn(4, 8), True, 4)
    layer.encode_rows(torch.randn(3, 8))
    with pytest.raises(IndexError):
        layer.encode_features(torch.randn(2, 64), torch.tensor([0, 1]))
    assert layer.busy_since is None


# An engine whose secure device fails.


def fail(*_):
    raise ValueError("planted")


def run_out_of_memory(*_):
    return torch.empty(1 << 60)


def plant_failure(loaded):
    loaded.model.layers[1].self_attn.secure.features.encode_keys = fail


def go_through_faults(model):
    """In one engine of this process: a key file that goes, then a device that fails."""
    llm = engine(model, skip_tokenizer_init=True)
    before = greedy(llm, [PROMPT])
    os.unlink(os.environ["SCX_KEY_FILE"])
    results = {"no key file": greedy(llm, [PROMPT]) == before}
    secure = llm.apply_model(lambda loaded: loaded.model.layers[1].self_attn.secure)[0]
    for name, fault in (("memory", run_out_of_memory), ("error", fail)):
        secure.features.encode_keys = fault
        try:
            results[name] = greedy(llm, [PROMPT])
        except Exception as error:
            results[name] = type(error).__name__, str(error)
    return results


def test_a_secure_device_that_fails_in_mid_step(tiny_llama, tmp_path):
    env = {
        "SCX_ENC_LAYERS": "0,1",
        "SCX_KEY_FILE": str(new_key_file(tmp_path / "key")),
    }
    results = in_new_process(go_through_faults, tiny_llama, env=env)
    # The key was read when the engine started.
    assert results["no key file"] is True
    kind, message = results["memory"]
    assert kind == "RuntimeError"
    assert "can't allocate memory" in message
    assert results["error"] == ("ValueError", "planted")


def process_id(_):
    return os.getpid()


def lose_an_engine(model, fault, **engine_args):
    """The errors of two calls, of which the first meets the fault, and its seconds."""
    llm = engine(model, skip_tokenizer_init=True, **engine_args)
    greedy(llm, [PROMPT])
    start = time.monotonic()
    if fault == "error":
        llm.apply_model(plant_failure)
    else:
        last_worker = llm.apply_model(process_id)[-1]
        threading.Timer(1.0, os.kill, (last_worker, signal.SIGKILL)).start()
    errors = []
    for _ in range(2):
        try:
            # Long enough that the fault comes before the end.
            errors.append(len(greedy(llm, [PROMPT] * 4, max_tokens=1000)))
        except Exception as error:
            errors.append(type(error).__name__)
    return errors, time.monotonic() - start


SEPARATE = {
    "SCX_ENC_LAYERS": "all",
    "VLLM_ENABLE_V1_MULTIPROCESSING": "1",
    "VLLM_ALLOW_INSECURE_SERIALIZATION": "1",
}


@pytest.mark.slow
@pytest.mark.parametrize("fault", ["error", "killed"])
def test_an_engine_process_that_fails_or_is_killed(fault, tiny_llama):
    errors, seconds = in_new_process(lose_an_engine, tiny_llama, fault, env=SEPARATE)
    assert errors == ["EngineDeadError", "EngineDeadError"]
    assert seconds < 60


def lose_a_rank(model):
    return lose_an_engine(model, "killed", tensor_parallel_size=2)


@pytest.mark.slow
def test_a_tensor_parallel_rank_that_is_killed(tiny_llama):
    env = SEPARATE | {"VLLM_CPU_OMP_THREADS_BIND": "0|1"}
    errors, seconds = in_new_process(lose_a_rank, tiny_llama, env=env)
    assert errors == ["EngineDeadError", "EngineDeadError"]
    assert seconds < 60


# The machine: a home that cannot be written, optimised Python, a full disk.


def tokens_and_home(model):
    return generate_each(
        [{"model": model, "skip_tokenizer_init": True}], PROMPTS
    ), os.access(os.path.expanduser("~"), os.W_OK)


@pytest.mark.slow
def test_a_home_that_cannot_be_written(tiny_llama):
    names = ("HOME", "XDG_CACHE_HOME", "VLLM_CACHE_ROOT", "VLLM_CONFIG_ROOT")
    nowhere = dict.fromkeys(names, "/proc/nowhere")
    native, _ = in_new_process(tokens_and_home, tiny_llama)
    env = nowhere | {"SCX_ENC_LAYERS": "all"}
    assert in_new_process(tokens_and_home, tiny_llama, env=env) == (native, False)


def test_the_embedded_model_needs_a_cache_that_can_be_written(monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", "/proc/nowhere")
    with pytest.raises(SCXError) as error:
        embedded.embedded_model("llama")
    assert str(error.value) == (
        "/proc/nowhere/scx-vllm cannot be made (No such file or directory): set "
        "XDG_CACHE_HOME to a writable folder"
    )


def test_the_embedded_model_needs_a_folder_of_the_user(monkeypatch, tmp_path):
    """Without HOME and an entry in passwd, as of an arbitrary user in a container."""
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.delenv("HOME", raising=False)

    def unknown(uid):
        raise KeyError(f"getpwuid(): uid not found: {uid}")

    monkeypatch.setattr(pwd, "getpwuid", unknown)
    with pytest.raises(SCXError) as error:
        embedded.embedded_model("llama")
    assert str(error.value) == (
        "no cache folder is known, because HOME is unset and this user has no home: set "
        "XDG_CACHE_HOME to a writable folder"
    )
    # It is there and not to be written, for root too.
    (tmp_path / "scx-vllm").symlink_to("/proc/self")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    with pytest.raises(SCXError, match=r"\d cannot be made \(.*\): set XDG_CACHE"):
        embedded.embedded_model("llama")


def optimised(model):
    """Whether asserts are off, tokens, and what is refused."""
    tokens = generate_each([{"model": model, "skip_tokenizer_init": True}], [PROMPT])
    refused = configure_each([({"model": model, "enable_lora": True}, {})])
    return not __debug__, tokens, refused


SCRIPT = """
import json, sys
from lab.engines import in_new_process
from tests.test_faults import optimised
for layers in ("", "all"):
    env = {"SCX_ENC_LAYERS": layers}
    print(json.dumps(in_new_process(optimised, sys.argv[1], env=env)))
"""


@pytest.mark.slow
def test_optimised_python(tiny_llama):
    command = [sys.executable, "-O", "-c", SCRIPT, str(tiny_llama)]
    done = subprocess.run(command, capture_output=True, text=True)  # noqa: S603
    assert done.returncode == 0, done.stderr
    lines = [line for line in done.stdout.splitlines() if line.startswith("[")]
    native, encoded = map(json.loads, lines)
    assert native[0] is encoded[0] is True
    assert native[1] == encoded[1]
    ((kind, message),) = encoded[2]
    assert kind == "SCXUnsupportedError"
    assert "LoRA picks adapters by row" in message


RECORD = record("native", [1.0])


def test_a_full_disk_is_one_line(tmp_path):
    full = tmp_path / "full.jsonl"
    full.symlink_to("/dev/full")
    with pytest.raises(UsageError) as error:
        append_record(RECORD, full)
    assert str(error.value) == f"cannot write {full}: No space left on device"


@contextlib.contextmanager
def files_end_at(size):
    """No file of this process grows beyond so many bytes: a disk that is nearly full."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_no_half_record_is_left(tmp_path):
    path = tmp_path / "records.jsonl"
    append_record(RECORD, path)
    for _ in range(2):
        with (
            files_end_at(path.stat().st_size + 40),
            pytest.raises(UsageError, match=f"cannot write {path}: "),
        ):
            append_record(RECORD, path)
    assert read_records(path) == [RECORD]


def test_no_half_arm_is_left(tmp_path, monkeypatch):
    def fill(function, plan, layers, draft):
        (draft / "results.json").write_text("x" * 1000)

    monkeypatch.setattr(evaluation, "in_own_session", fill)
    folder = tmp_path / "task" / "model" / "arm"
    with files_end_at(100), pytest.raises(OSError, match="File too large"):
        evaluation.run_arm(None, "", folder)
    assert not list(folder.parent.iterdir())
