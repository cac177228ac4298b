"""Encoded engines on a real GPU: native tokens in each graph mode and model runner.

Skipped where there is no GPU. In float32, where the encoded layer differs from
the native one by the order of sums only; a tiny random model with spread-out
logits.
"""

import pytest
import torch

from tests.engines import generate_each, in_new_process
from tests.tiny_models import PROMPTS

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")

MODES = {
    "eager": {},
    "piecewise": {
        "enforce_eager": False,
        "compilation_config": {
            "cudagraph_mode": "PIECEWISE",
            "cudagraph_capture_sizes": [1, 2, 4, 8],
        },
    },
    "default": {
        "enforce_eager": False,
        "compilation_config": {"cudagraph_capture_sizes": [1, 2, 4, 8]},
    },
}


def tokens(model, modes, **env):
    runs = [
        {
            "model": model,
            "skip_tokenizer_init": True,
            "attention_backend": "TRITON_ATTN",
            "gpu_memory_utilization": 0.3,
        }
        | MODES[mode]
        for mode in modes
    ]
    return in_new_process(generate_each, runs, PROMPTS, env=env)


@pytest.fixture(scope="module")
def native(tiny_qwen2):
    return tokens(tiny_qwen2, ["default"])[0]


def test_every_graph_mode(tiny_qwen2, native):
    results = tokens(tiny_qwen2, list(MODES), SCX_ENC_LAYERS="0,3")
    for mode, result in zip(MODES, results, strict=True):
        assert result == native, mode


def test_the_v1_model_runner(tiny_qwen2, native):
    env = {"SCX_ENC_LAYERS": "all", "VLLM_USE_V2_MODEL_RUNNER": "0"}
    assert tokens(tiny_qwen2, ["default"], **env) == [native]


def test_the_gpu_as_secure_device(tiny_qwen2, native):
    env = {"SCX_ENC_LAYERS": "0,3", "SCX_SECURE_DEVICE": "cuda"}
    assert tokens(tiny_qwen2, ["default"], **env) == [native]
