"""Encoded engines on a real GPU against native ones, by their log-probabilities.

Each graph mode, both model runners, the host and the GPU as secure device. A
tiny random model with spread-out logits.
"""

import logging
import statistics
import time

import pytest

from lab.engines import (
    differences,
    engine,
    generate_each,
    greedy,
    in_new_process,
    logprobs_each,
)
from lab.tiny_models import PROMPTS
from scx.codecs.affine import CONDITION

pytestmark = pytest.mark.gpu

GRAPHS = {"cudagraph_capture_sizes": [1, 2, 4, 8]}
MODES = {
    "eager": {},
    "piecewise": {
        "enforce_eager": False,
        "compilation_config": GRAPHS | {"cudagraph_mode": "PIECEWISE"},
    },
    "default": {"enforce_eager": False, "compilation_config": GRAPHS},
}
DTYPES = ["float32", "bfloat16"]
ENCODED = {
    "host": {"SCX_ENC_LAYERS": "0,3"},
    "host, V1 runner": {"SCX_ENC_LAYERS": "all", "VLLM_USE_V2_MODEL_RUNNER": "0"},
    "accelerator": {"SCX_ENC_LAYERS": "0,3", "SCX_SECURE_DEVICE": "cuda"},
    "host, affine": {"SCX_ENC_LAYERS": "0,3", "SCX_CODEC": "affine"},
    "accelerator, affine": {
        "SCX_ENC_LAYERS": "0,3",
        "SCX_SECURE_DEVICE": "cuda",
        "SCX_CODEC": "affine",
    },
}


def run(model, modes, **env):
    """Log-probabilities by mode and type."""
    names = [(mode, dtype) for mode in modes for dtype in DTYPES]
    runs = [
        {
            "model": model,
            "skip_tokenizer_init": True,
            "attention_backend": "TRITON_ATTN",
            "dtype": dtype,
        }
        | MODES[mode]
        for mode, dtype in names
    ]
    results = in_new_process(logprobs_each, runs, PROMPTS, env=env)
    return dict(zip(names, results, strict=True))


@pytest.fixture(scope="module")
def native(tiny_qwen2):
    results = run(tiny_qwen2, ["eager"])
    return {dtype: results["eager", dtype] for dtype in DTYPES}


@pytest.mark.parametrize("kind", ENCODED)
def test_log_probabilities_are_native(kind, tiny_qwen2, native):
    modes = ["default"] if "," in kind else list(MODES)
    results = run(tiny_qwen2, modes, **ENCODED[kind])
    native_error = statistics.mean(differences(native["bfloat16"], native["float32"]))
    total = 5 * 16 * len(PROMPTS)
    for mode in modes:
        exact = differences(results[mode, "float32"], native["float32"])
        # Only roundings of float32 differ: a few units of 2^-24 of logits below 100,
        # which grow from layer to layer. Any wrong step gives differences above 1.
        assert len(exact) == total, mode
        assert max(exact) < 1e-2, mode
        # In bfloat16 each side has rounding errors of its own, of the same size: as many
        # roundings, at the same places. The factor is for the spread of two means. The
        # affine codec's maps stretch those of encoded features by CONDITION at most.
        allowed = CONDITION if "affine" in kind else 1.5
        rounded = differences(results[mode, "bfloat16"], native["float32"])
        assert len(rounded) > total / 4, mode
        assert statistics.mean(rounded) < allowed * native_error, mode


SERVING = {"skip_tokenizer_init": True, "attention_backend": "TRITON_ATTN"}


def host_of(llm):
    return llm.apply_model(lambda loaded: loaded.encoded[0].secure._host)[0]


def pass_boundaries(model, turns):
    """Tokens of an engine with whole graphs before and across each of the turns."""
    llm = engine(model, **SERVING, **MODES["default"])
    results = [greedy(llm, PROMPTS)]
    host = host_of(llm)
    for turn in turns:
        # Some trips of the prompts come before it and all others after.
        host.sequence.fill_(turn - 5)
        results.append(greedy(llm, PROMPTS))
        assert host.sequence.item() > turn
    return results


def test_an_engine_goes_past_two_thousand_million_trips(tiny_qwen2):
    run = {"model": tiny_qwen2} | SERVING | MODES["default"]
    (native,) = in_new_process(generate_each, [run], PROMPTS)
    env = {"SCX_ENC_LAYERS": "0,3"}
    results = in_new_process(pass_boundaries, tiny_qwen2, [2**31, 2**32], env=env)
    assert results == [native] * 3


def lose_a_trip(model, mode):
    """What an engine ends with, and after how long, once a trip was cut off."""
    llm = engine(model, **SERVING, **MODES[mode])
    greedy(llm, PROMPTS)
    host, lines = host_of(llm), []
    logging.getLogger("vllm.scx").addFilter(lambda r: lines.append(r.getMessage()) or 1)
    start = time.monotonic()
    # As a kernel does that is stopped after its first store.
    host.mailbox.request[0] = 4
    host.mailbox.ready[0] += 1
    for thread in host.workers.threads:
        thread.join(60)
    try:
        greedy(llm, PROMPTS)
    except Exception as error:
        return str(error), lines, time.monotonic() - start
    return "no error", lines, time.monotonic() - start


@pytest.mark.parametrize("mode", ["eager", "default"])
def test_a_trip_that_is_cut_off_ends_the_engine(mode, tiny_qwen2):
    env = {"SCX_ENC_LAYERS": "0,3"}
    error, lines, seconds = in_new_process(lose_a_trip, tiny_qwen2, mode, env=env)
    said = "the secure device cpu has ended: rows that the accelerator announced did not"
    assert said in error
    assert sum(said in line for line in lines) == 1
    assert seconds < 60
