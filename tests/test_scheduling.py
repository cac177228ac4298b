"""Scheduling and caching with encoded layers: native tokens, and native statistics.

The counters show that what a case is named for did happen: prompts found in the
cache, requests preempted. They are vLLM's own, those of its /metrics.
"""

import pytest

from lab.engines import engine, greedy, in_new_process, shut_down
from lab.tiny_models import PROMPTS, save

WINDOW = 32
LONG = PROMPTS[-1]
SAME_PREFIX = [[*LONG, i] for i in range(4)]
BLOCKS = {"block_size": 32}
CASES = {
    "prefix caching": ({"enable_prefix_caching": True} | BLOCKS, SAME_PREFIX * 2, 16),
    "chunked prefill": ({"max_num_batched_tokens": 16, "max_num_seqs": 8}, PROMPTS, 16),
    "two at a time": ({"max_num_seqs": 2}, PROMPTS, 16),
    # 6 requests grow to 105 tokens each, 4 blocks, and only 11 blocks hold tokens.
    "preemption": (
        {"num_gpu_blocks_override": 12, "max_model_len": 256} | BLOCKS,
        [[i, *LONG[:40]] for i in range(6)],
        64,
    ),
}
HITS = "vllm:prefix_cache_hits"
PREEMPTIONS = "vllm:num_preemptions"
COUNTERS = ("vllm:prefix_cache_queries", HITS, "vllm:prompt_tokens_cached", PREEMPTIONS)


def run_each(runs):
    """Tokens and counters by name; a run is engine arguments, prompts, a token count."""
    results = {}
    for name, (arguments, prompts, max_tokens) in runs.items():
        llm = engine(skip_tokenizer_init=True, disable_log_stats=False, **arguments)
        tokens = greedy(llm, prompts, max_tokens)
        counters = {m.name: m.value for m in llm.get_metrics() if m.name in COUNTERS}
        results[name] = tokens, counters
        shut_down(llm)
    return results


def native_and_encoded(runs, layers):
    settings = {}, {"SCX_ENC_LAYERS": layers}
    return [in_new_process(run_each, runs, env=env) for env in settings]


@pytest.fixture(scope="module")
def scheduled(tiny_qwen2):
    runs = {
        name: ({"model": tiny_qwen2} | arguments, *rest)
        for name, (arguments, *rest) in CASES.items()
    }
    return native_and_encoded(runs, "all")


@pytest.mark.parametrize("case", CASES)
def test_tokens_and_counters_are_native(case, scheduled):
    native, encoded = (results[case] for results in scheduled)
    assert set(native[1]) == set(COUNTERS)
    assert encoded == native


def test_the_cases_did_what_they_are_named_for(scheduled):
    _, encoded = scheduled
    # All but the first request find the prefix, in whole blocks.
    found = len(LONG) // 32 * 32
    assert encoded["prefix caching"][1][HITS] == (len(SAME_PREFIX) * 2 - 1) * found
    assert encoded["preemption"][1][PREEMPTIONS] > 0
    assert all(
        encoded[case][1][PREEMPTIONS] == 0 for case in CASES if case != "preemption"
    )


def test_a_request_reads_what_an_earlier_one_cached(scheduled):
    _, encoded = scheduled
    tokens, _ = encoded["prefix caching"]
    assert tokens[: len(SAME_PREFIX)] == tokens[len(SAME_PREFIX) :]


@pytest.mark.slow
def test_sliding_windows(tmp_path):
    kinds = ["sliding_attention", "full_attention"] * 2
    window = {"sliding_window": WINDOW}
    models = {
        "full": save(tmp_path / "full", "LlamaForCausalLM", head_dim=64),
        "alternate": save(
            tmp_path / "alternate",
            "LlamaForCausalLM",
            head_dim=64,
            layer_types=kinds,
            **window,
        ),
        "qwen2": save(
            tmp_path / "qwen2",
            "Qwen2ForCausalLM",
            use_sliding_window=True,
            max_window_layers=4,
            **window,
        ),
    }
    # Layers with and without a window have blocks of their own.
    blocks = {"num_gpu_blocks_override": 256}
    runs = {
        name: ({"model": model} | blocks, PROMPTS, 16) for name, model in models.items()
    }
    native, encoded = native_and_encoded(runs, "0,3")
    assert encoded == native
    # The weights are the same: the window alone made the long prompt's text another.
    assert native["full"][0][-1] != native["alternate"][0][-1]
