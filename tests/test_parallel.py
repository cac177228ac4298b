"""Several processes for one model: tensor, pipeline and data parallel."""

import asyncio
import secrets

import pytest
import torch

from tests.engines import (
    ENGINE_ARGS,
    engine,
    generate_each,
    greedy,
    in_new_process,
    shut_down,
)
from tests.test_kv_cache import LAYERS, PROMPT, TOLERANCE, cached_tokens
from tests.tiny_models import PROMPTS

PROCESSES = {
    "VLLM_ENABLE_V1_MULTIPROCESSING": "1",
    "VLLM_CPU_OMP_THREADS_BIND": "0|1",
    "VLLM_ALLOW_INSECURE_SERIALIZATION": "1",
}


@pytest.fixture(scope="module")
def native(tiny_llama):
    run = {"model": tiny_llama, "skip_tokenizer_init": True}
    (tokens,) = in_new_process(generate_each, [run], PROMPTS)
    return tokens


def encoded_tokens(model, layers, **arguments):
    run = {"model": model, "skip_tokenizer_init": True} | arguments
    env = {"SCX_ENC_LAYERS": layers} | PROCESSES
    (tokens,) = in_new_process(generate_each, [run], PROMPTS, env=env)
    return tokens


def test_two_tensor_parallel_ranks(tiny_llama, native):
    assert encoded_tokens(tiny_llama, "all", tensor_parallel_size=2) == native


# Of 4 layers a stage has 2: one in each, or encoded ones in one stage only.
@pytest.mark.parametrize(
    "layers",
    [
        "0,3",
        pytest.param("0", marks=pytest.mark.slow),
        pytest.param("2,3", marks=pytest.mark.slow),
    ],
)
def test_two_pipeline_stages(layers, tiny_llama, native):
    assert encoded_tokens(tiny_llama, layers, pipeline_parallel_size=2) == native


def generate_on_both(model):
    """Tokens from each of two data parallel engines, which get the same requests."""
    from vllm import SamplingParams
    from vllm.engine.arg_utils import AsyncEngineArgs
    from vllm.v1.engine.async_llm import AsyncLLM

    params = SamplingParams(temperature=0, max_tokens=16, ignore_eos=True)

    async def one(llm, rank, number):
        inputs = {"prompt_token_ids": PROMPTS[number]}
        name = f"{rank}-{number}"
        async for output in llm.generate(inputs, params, name, data_parallel_rank=rank):
            tokens = list(output.outputs[0].token_ids)
        return tokens

    async def everything():
        llm = AsyncLLM.from_engine_args(
            AsyncEngineArgs(
                model=str(model),
                skip_tokenizer_init=True,
                data_parallel_size=2,
                **ENGINE_ARGS,
            )
        )
        tokens = [
            await asyncio.gather(*(one(llm, rank, i) for i in range(len(PROMPTS))))
            for rank in range(2)
        ]
        llm.shutdown()
        return tokens

    return asyncio.run(everything())


@pytest.mark.slow
def test_two_data_parallel_engines(tiny_llama, native):
    env = {"SCX_ENC_LAYERS": "0,3"} | PROCESSES
    assert in_new_process(generate_on_both, tiny_llama, env=env) == [native, native]


def encoded_caches(model, ranks):
    """Each rank's raw K and V of each layer for PROMPT: (tokens, its heads x D)."""
    llm = engine(model, tensor_parallel_size=ranks, skip_tokenizer_init=True)
    greedy(llm, [PROMPT], max_tokens=1)

    def read(loaded):
        return [
            cached_tokens(layer.self_attn.attn.kv_cache, len(PROMPT))
            for layer in loaded.model.layers
        ]

    caches = llm.apply_model(read)
    shut_down(llm)
    return caches


@pytest.mark.slow
@pytest.mark.parametrize("kv_heads", [2, 1])
def test_a_cache_does_not_depend_on_the_number_of_ranks(kv_heads, tiny, tmp_path):
    name = f"qwen2-{kv_heads}-kv-heads"
    model = tiny(name, "Qwen2ForCausalLM", num_key_value_heads=kv_heads)
    run = {"model": model, "skip_tokenizer_init": True}
    (native,) = in_new_process(generate_each, [run], PROMPTS)
    # More ranks than key/value heads: each rank has a copy of its head.
    assert encoded_tokens(model, "all", tensor_parallel_size=2) == native

    key_file = tmp_path / "key"
    key_file.touch(mode=0o600)
    key_file.write_bytes(secrets.token_bytes(32))
    env = {"SCX_ENC_LAYERS": "all", "SCX_KEY_FILE": str(key_file)}
    (plain,) = in_new_process(encoded_caches, model, 1)
    (whole,) = in_new_process(encoded_caches, model, 1, env=env)
    ranks = in_new_process(encoded_caches, model, 2, env=env | PROCESSES)
    for layer in range(LAYERS):
        for kind in (0, 1):
            halves = [rank[layer][kind] for rank in ranks]
            if kv_heads == 1:
                assert torch.equal(*halves)
                del halves[1]
            torch.testing.assert_close(
                torch.cat(halves, 1), whole[layer][kind], **TOLERANCE
            )
            assert (whole[layer][kind] - plain[layer][kind]).abs().max() > 0.1
