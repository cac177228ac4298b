import contextlib
import os
import signal
from pathlib import Path

# Before huggingface_hub reads it: no test may depend on a network, or wait for one.
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import psutil
import pytest
import torch

from lab import tiny_models
from scripts import gpu_tests

# Told to end, as by `timeout` or a CI runner, a run of tests ends its processes too.
signal.signal(signal.SIGTERM, signal.default_int_handler)

SECONDS = 480
SLOW_SECONDS = 1800
"""The most that a test, or what it and others share, may take before it fails."""

TOO_FEW_DEVICES = pytest.StashKey[int]()
"""How many tests need more CUDA devices than are here."""


def bounded(item):
    seconds = SLOW_SECONDS if item.get_closest_marker("slow") else SECONDS

    def give_up(_number, _frame):
        # A pool waits for its processes whatever happens, and so would the test.
        for process in psutil.Process().children(recursive=True):
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()
        pytest.fail(f"not ended after {seconds} s; its processes were killed")

    before = signal.signal(signal.SIGALRM, give_up)
    signal.alarm(seconds)
    try:
        return (yield)
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def pytest_addoption(parser):
    parser.addoption("--record", metavar="FILE", help="where to record a run on a GPU")
    parser.addoption("--commit", help="what that run tests (default: as git says)")


def pytest_configure(config):
    if file := config.getoption("--record"):
        if not torch.cuda.is_available():
            raise pytest.UsageError("--record: no CUDA device here to record a run of")
        commit = config.getoption("--commit") or gpu_tests.commit_here()
        if not commit:
            raise pytest.UsageError("--record: commit this code, or name its --commit")
        config.pluginmanager.register(gpu_tests.Recorder(Path(file), commit))


# Before others are left out by name or by marker, so that they are not counted twice.
@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(config, items):
    """Leave out the tests that need more CUDA devices than are here."""
    here = torch.cuda.device_count()
    wanting = [item for item in items if gpu_tests.devices_for(item) > here]
    items[:] = [item for item in items if gpu_tests.devices_for(item) <= here]
    config.hook.pytest_deselected(items=wanting)
    config.stash[TOO_FEW_DEVICES] = len(wanting)


def pytest_report_collectionfinish(config):
    if count := config.stash[TOO_FEW_DEVICES]:
        return (
            f"{count} gpu tests deselected: they need more than the "
            f"{torch.cuda.device_count()} CUDA devices here; run them with make test-gpu"
        )


pytest_runtest_setup = pytest.hookimpl(wrapper=True)(bounded)
pytest_runtest_call = pytest.hookimpl(wrapper=True)(bounded)
pytest_runtest_teardown = pytest.hookimpl(wrapper=True)(bounded)


@pytest.fixture(scope="session")
def tiny(tmp_path_factory):
    """Paths of tiny models by name, each made on first use."""
    made = {}

    def path(name, architecture, **config):
        if name not in made:
            folder = tmp_path_factory.mktemp("models") / name
            made[name] = tiny_models.save(folder, architecture, **config)
        return made[name]

    return path


@pytest.fixture(scope="session")
def tiny_llama(tiny):
    """Llama with a head_dim of its own: 4 heads of 64 on 128 hidden features."""
    return tiny("llama", "LlamaForCausalLM", head_dim=64)


@pytest.fixture(scope="session")
def tiny_qwen2(tiny):
    """Qwen2 with non-zero biases and tied embeddings."""
    return tiny("qwen2", "Qwen2ForCausalLM", tie_word_embeddings=True)
