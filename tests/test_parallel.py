"""Several processes for one model: tensor, pipeline and data parallel."""

import asyncio
import itertools

import pytest
import torch

from lab.engines import (
    ENGINE_ARGS,
    engine,
    generate_each,
    greedy,
    in_new_process,
    shut_down,
)
from lab.root_keys import new_key_file
from lab.tiny_models import PROMPTS
from tests.kv_caches import LAYERS, PROMPT, TOLERANCE, cached_tokens

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


# Of 4 layers each stage has 2. With layer 3 alone, the first has none that is encoded.
@pytest.mark.parametrize("layers", ["0,3", pytest.param("3", marks=pytest.mark.slow)])
def test_two_pipeline_stages(layers, tiny_llama, native):
    tokens = encoded_tokens(
        tiny_llama,
        layers,
        pipeline_parallel_size=2,
        # vLLM's CPU worker allocates what a later stage receives in its warm-up, which
        # it leaves out when it is eager. Traced, not compiled: quicker, the same code.
        enforce_eager=False,
        compilation_config={"mode": 2, "backend": "eager"},
    )
    assert tokens == native


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


def read_caches(loaded):
    """A rank's raw K and V of each layer for PROMPT; sent to the ranks by its name."""
    return [
        cached_tokens(layer.self_attn.attn.kv_cache, len(PROMPT))
        for layer in loaded.model.layers
    ]


def tokens_and_caches(models, ranks):
    """For each model its tokens, and each rank's raw K and V of each layer for PROMPT.

    K and V are (tokens, the rank's heads x D).
    """
    results = []
    for model in models:
        llm = engine(
            model, tensor_parallel_size=ranks, skip_tokenizer_init=True, block_size=128
        )
        greedy(llm, [PROMPT], max_tokens=1)
        caches = llm.apply_model(read_caches)
        results.append((greedy(llm, PROMPTS), caches))
        shut_down(llm)
    return results


@pytest.mark.slow
def test_a_cache_does_not_depend_on_the_number_of_ranks(tiny, tmp_path):
    key_file = new_key_file(tmp_path / "key")
    encoded = {"SCX_ENC_LAYERS": "all", "SCX_KEY_FILE": str(key_file)}
    # With one key/value head, each of two ranks has a copy of it.
    models = [
        tiny(f"{count}-kv-heads", "Qwen2ForCausalLM", num_key_value_heads=count)
        for count in (1, 2)
    ]
    native, single, double = (
        in_new_process(tokens_and_caches, models, ranks, env=env)
        for ranks, env in ((1, {}), (1, encoded), (2, encoded | PROCESSES))
    )
    for kv_heads, plain, whole, parts in zip((1, 2), native, single, double, strict=True):
        assert plain[0] == whole[0] == parts[0]
        for layer, kind in itertools.product(range(LAYERS), range(2)):
            (clear,), (one,) = (
                [rank[layer][kind] for rank in caches] for _, caches in (plain, whole)
            )
            ranks = [rank[layer][kind] for rank in parts[1]]
            if kv_heads == 1:
                assert torch.equal(*ranks)
                del ranks[1]
            torch.testing.assert_close(torch.cat(ranks, 1), one, **TOLERANCE)
            assert (one - clear).abs().max() > 0.1
