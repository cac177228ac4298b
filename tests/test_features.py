"""vLLM's features with encoded layers: the tokens are the native ones."""

import pytest

from tests.engines import engine, generate_each, greedy, in_new_process, shut_down
from tests.tiny_models import PROMPTS, ROPE_VARIANTS, save

ALL = {"SCX_ENC_LAYERS": "all"}


def assert_native(runs, **env):
    """Each run, a dict of engine arguments, gives the same tokens encoded and native."""
    runs = [{"skip_tokenizer_init": True} | run for run in runs]
    native = in_new_process(generate_each, runs, PROMPTS, env=env)
    encoded = in_new_process(generate_each, runs, PROMPTS, env=ALL | env)
    for run, ours, theirs in zip(runs, encoded, native, strict=True):
        assert ours == theirs, run


def test_rope_variants_and_head_shapes(tmp_path):
    models = [
        save(tmp_path / name, "LlamaForCausalLM", head_dim=64, rope_parameters=rope)
        for name, rope in ROPE_VARIANTS.items()
    ]
    for heads, kv_heads in ((4, 4), (4, 1), (6, 2)):
        name = f"qwen2-{heads}-{kv_heads}"
        shape = {"num_attention_heads": heads, "num_key_value_heads": kv_heads}
        shape |= {"hidden_size": 32 * heads, "tie_word_embeddings": heads == 6}
        models.append(save(tmp_path / name, "Qwen2ForCausalLM", **shape))
    assert_native([{"model": model} for model in models])


def test_scheduling_and_caching(tiny_llama, tiny_qwen2):
    assert_native(
        [
            {"model": model} | arguments
            for model in (tiny_llama, tiny_qwen2)
            for arguments in (
                {"enable_prefix_caching": True},
                {"max_num_batched_tokens": 16, "max_num_seqs": 8},
                {"max_num_seqs": 2},
            )
        ]
    )


def repeat_with_prefix_caching(model):
    llm = engine(model, enable_prefix_caching=True, skip_tokenizer_init=True)
    prompts = [PROMPTS[-1] + [i] for i in range(3)]
    first, second = (greedy(llm, prompts) for _ in range(2))
    shut_down(llm)
    return first, second


def test_cached_prefixes_are_read_back(tiny_llama):
    native, _ = in_new_process(repeat_with_prefix_caching, tiny_llama)
    first, second = in_new_process(repeat_with_prefix_caching, tiny_llama, env=ALL)
    assert first == second == native


@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_engine_in_a_process_of_its_own(method, tiny_llama):
    assert_native(
        [{"model": tiny_llama}],
        VLLM_ENABLE_V1_MULTIPROCESSING="1",
        VLLM_WORKER_MULTIPROCESSING_METHOD=method,
    )


def test_two_tensor_parallel_ranks(tiny_llama):
    assert_native(
        [{"model": tiny_llama, "tensor_parallel_size": 2}],
        VLLM_ENABLE_V1_MULTIPROCESSING="1",
        VLLM_CPU_OMP_THREADS_BIND="0|1",
    )


def test_more_ranks_than_kv_heads(tiny):
    model = tiny("one-kv-head", "Qwen2ForCausalLM", num_key_value_heads=1)
    assert_native(
        [{"model": model, "tensor_parallel_size": 2}],
        VLLM_ENABLE_V1_MULTIPROCESSING="1",
        VLLM_CPU_OMP_THREADS_BIND="0|1",
    )


def register_twice(model):
    from scx import init_vllm_plugin
    from scx.engine import ENCODED_CLASSES

    init_vllm_plugin()
    llm = engine(model, skip_tokenizer_init=True)
    init_vllm_plugin()
    again = engine(model, skip_tokenizer_init=True)
    from vllm.model_executor.models.config import MODELS_CONFIG_MAP

    depth = [
        sum(getattr(base, "configures_scx", False) for base in hook.__mro__)
        for hook in (MODELS_CONFIG_MAP[name] for name in ENCODED_CLASSES)
    ]
    return depth, greedy(llm, PROMPTS), greedy(again, PROMPTS)


def test_registering_twice_changes_nothing(tiny_llama):
    (native,) = in_new_process(
        generate_each, [{"model": tiny_llama, "skip_tokenizer_init": True}], PROMPTS
    )
    depth, first, second = in_new_process(register_twice, tiny_llama, env=ALL)
    assert set(depth) == {1}
    assert first == second == native
