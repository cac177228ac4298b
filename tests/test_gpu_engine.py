"""Encoded engines on a real GPU against native ones, by their log-probabilities.

Each graph mode, both model runners, the host and the GPU as secure device. A
tiny random model with spread-out logits. Skipped where there is no GPU.
"""

import statistics

import pytest
import torch

from scx.codecs.affine import CONDITION
from tests.engines import differences, in_new_process, logprobs_each
from tests.tiny_models import PROMPTS

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")

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
