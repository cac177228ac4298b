"""vLLM's features with encoded layers: the tokens are the native ones."""

import pytest

from lab.engines import engine, generate_each, greedy, in_new_process, shut_down
from lab.tiny_models import PROMPTS, ROPE_VARIANTS, save
from scx.commands.demo_model import embedded_model

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


@pytest.mark.parametrize(
    "method", ["spawn", pytest.param("fork", marks=pytest.mark.slow)]
)
def test_engine_in_a_process_of_its_own(method, tiny_llama):
    assert_native(
        [{"model": tiny_llama}],
        VLLM_ENABLE_V1_MULTIPROCESSING="1",
        VLLM_WORKER_MULTIPROCESSING_METHOD=method,
    )


def embed_and_continue(model):
    """Embeddings of prompts, and tokens after prompts that are embeddings themselves."""
    import torch
    from vllm import SamplingParams

    llm = engine(model, runner="pooling")
    outputs = llm.embed([{"prompt_token_ids": p} for p in PROMPTS], use_tqdm=False)
    pooled = torch.tensor([output.outputs.embedding for output in outputs])
    shut_down(llm)

    llm = engine(model, enable_prompt_embeds=True)
    width = llm.llm_engine.model_config.get_hidden_size()
    rows = torch.randn(40, width, generator=torch.manual_seed(0))
    params = SamplingParams(temperature=0, max_tokens=16, ignore_eos=True)
    (output,) = llm.generate({"prompt_embeds": rows}, params, use_tqdm=False)
    shut_down(llm)
    return pooled, list(output.outputs[0].token_ids)


@pytest.mark.slow
def test_embeddings_in_and_out():
    # vLLM asks for a tokenizer here, even for token ids.
    model = embedded_model("llama")
    (pooled, tokens), (native_pooled, native_tokens) = (
        in_new_process(embed_and_continue, model, env=env) for env in (ALL, {})
    )
    # Normalised to length 1, so this is relative: sums in float32 in another order.
    assert (pooled - native_pooled).abs().max() < 1e-5
    assert tokens == native_tokens


def register_twice(model):
    from vllm.config import VllmConfig
    from vllm.v1.worker.worker_base import WorkerWrapperBase

    stock = VllmConfig.try_verify_and_update_config
    stock_too = WorkerWrapperBase.initialize_from_config
    # Looking it up joins already.
    from scx import init_vllm_plugin

    init_vllm_plugin()
    llm = engine(model, skip_tokenizer_init=True)
    init_vllm_plugin()
    again = engine(model, skip_tokenizer_init=True)
    once = (
        VllmConfig.try_verify_and_update_config.__wrapped__ is stock
        and WorkerWrapperBase.initialize_from_config.__wrapped__ is stock_too
    )
    return once, greedy(llm, PROMPTS), greedy(again, PROMPTS)


def test_registering_twice_changes_nothing(tiny_llama):
    (native,) = in_new_process(
        generate_each, [{"model": tiny_llama, "skip_tokenizer_init": True}], PROMPTS
    )
    once, first, second = in_new_process(register_twice, tiny_llama, env=ALL)
    assert once
    assert first == second == native
