"""Speculative decoding whose drafts are looked up, not computed: native tokens."""

import importlib.util

import pytest

from lab.engines import engine, generate_each, greedy, in_new_process, shut_down
from scx.commands.demo_model import embedded_model

TEXTS = [
    "one two three four one two three four one two three four one two",
    "The cat sat on the mat. The dog sat on the rug. The cat sat on the",
    "def add(a, b):\n    return a + b\n\ndef sub(a, b):\n    return",
]
TOKENS = 32


def speculate(model, method):
    """Greedy tokens, and the numbers of drafted and of accepted tokens."""
    speculation = {"method": method, "num_speculative_tokens": 3}
    llm = engine(model, speculative_config=speculation, disable_log_stats=False)
    tokens = greedy(llm, TEXTS, TOKENS)
    counters = {metric.name: metric for metric in llm.get_metrics()}
    shut_down(llm)
    names = ("vllm:spec_decode_num_draft_tokens", "vllm:spec_decode_num_accepted_tokens")
    return tokens, *(counters[name].value for name in names)


@pytest.mark.parametrize(
    "method",
    [
        "ngram",
        pytest.param(
            "suffix",
            marks=[
                pytest.mark.slow,
                pytest.mark.skipif(
                    importlib.util.find_spec("arctic_inference") is None,
                    reason="vLLM's suffix decoding needs arctic-inference",
                ),
            ],
        ),
    ],
)
def test_accepted_drafts_are_native_tokens(method):
    model = embedded_model("qwen2")
    (native,) = in_new_process(generate_each, [{"model": model}], TEXTS, TOKENS)
    env = {"SCX_ENC_LAYERS": "0,29"}
    tokens, drafted, accepted = in_new_process(speculate, model, method, env=env)
    assert tokens == native
    assert drafted >= accepted > len(TEXTS)
