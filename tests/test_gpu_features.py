"""vLLM's features that need a GPU, with encoded layers.

Features that a CPU has too are tested in their own files, which run on a GPU alike.
"""

import itertools
import statistics

import pytest
import torch

from lab.engines import (
    differences,
    engine,
    generate_each,
    greedy,
    in_new_process,
    logprobs,
    logprobs_each,
    shut_down,
    watch_rows,
)
from lab.quantized_models import save_quantized
from lab.root_keys import new_key_file
from lab.tiny_models import FAMILIES, PROMPTS, save
from scx import keys
from tests import longrope
from tests.kv_caches import EAGER, LAYERS, assert_encoded, caches
from tests.kv_stores import run_on_store

pytestmark = pytest.mark.gpu

TRITON = {"attention_backend": "TRITON_ATTN"}
FLASH = {"attention_backend": "FLASH_ATTN"}
COMPILED = {
    "enforce_eager": False,
    "compilation_config": {"cudagraph_capture_sizes": [1, 2, 4, 8]},
}
SETTINGS = {
    "native": {},
    "host": {"SCX_ENC_LAYERS": "all"},
    "accelerator": {"SCX_ENC_LAYERS": "0,3", "SCX_SECURE_DEVICE": "cuda"},
}
ENCODED = [name for name in SETTINGS if name != "native"]


# Formats that round. As in test_formats.py their own error is the measure.

WEIGHTS = ("int8", "fp8", "gptq", "awq")
BFLOAT16 = {"dtype": "bfloat16"}
FP8_CACHE = BFLOAT16 | {"kv_cache_dtype": "fp8"}
ROUNDED = {
    # FlashAttention's results are bfloat16 where the cache is fp8.
    "fp8 cache, Triton": TRITON | FP8_CACHE,
    "fp8 cache, FlashAttention": FLASH | FP8_CACHE,
    "fp8 as it loads": TRITON | BFLOAT16 | {"quantization": "fp8"},
}


def logprobs_by_setting(runs, exact):
    """Log-probabilities by setting and run, and native ones of the model in float32."""
    runs = {
        name: {"skip_tokenizer_init": True} | run
        for name, run in (runs | {"exact": TRITON | {"model": exact}}).items()
    }
    return {
        name: dict(
            zip(
                runs,
                in_new_process(logprobs_each, list(runs.values()), PROMPTS, env=env),
                strict=True,
            )
        )
        for name, env in SETTINGS.items()
    }


def assert_rounded_alike(results, form, allowed):
    """That encoded and native differ by no more than a part of the format's own error.

    A value is rounded to another level where the sums behind it, in another order,
    are rounded to another number of 16 bits. There are 32 of bfloat16 for one of fp8,
    so that is about one value in 32, by a level, where all are off by a level over
    sqrt(12): 0.6 times the error. Of float16 there are 256: 0.2 times.
    """
    native = results["native"]
    error = statistics.mean(differences(native[form], native["exact"]))
    assert error > 1e-2, "not quantised"
    for setting in ENCODED:
        between = differences(results[setting][form], native[form])
        assert len(between) > 5 * 16 * len(PROMPTS) / 4
        assert statistics.mean(between) < allowed * error, setting


@pytest.fixture(scope="module")
def quantized(tiny_llama, tmp_path_factory):
    root = tmp_path_factory.mktemp("quantized")
    models = {form: save_quantized(tiny_llama, root / form, form) for form in WEIGHTS}
    # The kernels for four bits take scales of 16 bits as they are saved.
    runs = {
        form: TRITON | {"model": model, "dtype": "float16"}
        for form, model in models.items()
    }
    return logprobs_by_setting(runs, tiny_llama)


@pytest.mark.parametrize("form", WEIGHTS)
def test_quantised_weights(form, quantized):
    assert_rounded_alike(quantized, form, 0.35)


@pytest.fixture(scope="module")
def rounded(tiny_llama):
    runs = {form: run | {"model": tiny_llama} for form, run in ROUNDED.items()}
    return logprobs_by_setting(runs, tiny_llama)


@pytest.mark.parametrize("form", ROUNDED)
def test_fp8_caches_and_weights_rounded_as_they_load(form, rounded):
    assert_rounded_alike(rounded, form, 0.7)


# Schedules, in float32 with native tokens.


def tokens_and_schedule(runs):
    results = []
    for run in runs:
        llm = engine(skip_tokenizer_init=True, **run)
        config = llm.llm_engine.vllm_config.scheduler_config
        results.append((greedy(llm, PROMPTS), config.async_scheduling))
        shut_down(llm)
    return results


def test_asynchronous_scheduling(tiny_qwen2):
    runs = [
        {"model": tiny_qwen2, "async_scheduling": choice} | TRITON | COMPILED
        for choice in (True, False)
    ]
    native = in_new_process(tokens_and_schedule, runs)
    assert [chosen for _, chosen in native] == [True, False]
    for name in ENCODED:
        assert in_new_process(tokens_and_schedule, runs, env=SETTINGS[name]) == native


def offload(model):
    """Tokens of some long prompts, the first one again, and the rows computed for it.

    The GPU holds 63 blocks of 16 tokens and each prompt needs 20, so that the first
    one is no longer there. vLLM's own counter loses hits of steps without an output.
    """
    llm = engine(
        model,
        skip_tokenizer_init=True,
        enable_prefix_caching=True,
        kv_offloading_size=0.25,
        num_gpu_blocks_override=64,
        block_size=16,
        **TRITON,
    )
    prompts = [[i, *PROMPTS[-1]] for i in range(5)]
    tokens = [greedy(llm, [prompt])[0] for prompt in prompts]
    rows = watch_rows(llm)
    tokens += greedy(llm, prompts[:1])
    shut_down(llm)
    return tokens, sum(rows)


def test_a_cache_that_is_offloaded_to_the_host(tiny_llama):
    tokens, rows = in_new_process(offload, tiny_llama)
    assert tokens[0] == tokens[-1]
    assert rows < len(PROMPTS[-1])
    for name in ENCODED:
        result = in_new_process(offload, tiny_llama, env=SETTINGS[name])
        assert result == (tokens, rows)


LOOK_UP = {
    "speculative_config": {
        "method": "ngram_gpu",
        "num_speculative_tokens": 2,
        "prompt_lookup_max": 3,
    }
}


def speculate(run):
    llm = engine(**run, skip_tokenizer_init=True, disable_log_stats=False)
    tokens = greedy(llm, PROMPTS, max_tokens=64)
    counters = {metric.name: metric for metric in llm.get_metrics()}
    shut_down(llm)
    drafted = counters.get("vllm:spec_decode_num_draft_tokens")
    return tokens, drafted.value if drafted else 0


@pytest.mark.parametrize("mode", [EAGER, COMPILED], ids=["eager", "graphs"])
def test_drafts_that_the_gpu_looks_up(mode, tiny_llama):
    run = {"model": tiny_llama} | TRITON | mode
    native, none = in_new_process(speculate, run)
    assert not none
    for name in ENCODED:
        env = SETTINGS[name]
        tokens, drafted = in_new_process(speculate, run | LOOK_UP, env=env)
        assert drafted > 0
        assert tokens == native


def test_both_tables_of_longrope(tmp_path):
    """As test_rotary.py has it, in the fused kernels and in graphs."""
    runs = longrope.runs(tmp_path, TRITON | COMPILED)
    native = in_new_process(generate_each, runs, PROMPTS)
    for name in ENCODED:
        assert in_new_process(generate_each, runs, PROMPTS, env=SETTINGS[name]) == native


# Memory that comes and goes.


def in_pools(worker):
    """Which memory lies in the pools that sleep mode copies or drops: that of each tensor
    of the secure layers, and that of each parameter; and a row key, if a GPU has one."""
    from vllm.device_allocator.cumem import CuMemAllocator

    held = CuMemAllocator.get_instance().pointer_to_data.values()
    ranges = [(data.handle[2], data.handle[2] + data.handle[1]) for data in held]

    def lie(tensors):
        return [
            any(begin <= tensor.data_ptr() < end for begin, end in ranges)
            for tensor in tensors
        ]

    loaded = worker.model_runner.get_model()
    ours, key = [], None
    for attention in loaded.encoded:
        secure = attention.secure
        parts = [secure, secure.features, getattr(secure, "_host", secure)]
        for member in (member for part in parts for member in vars(part).values()):
            several = member if isinstance(member, tuple) else (member,)
            ours += [m for m in several if isinstance(m, torch.Tensor) and m.is_cuda]
        if (row_key := getattr(secure, "_row_key", None)) is not None:
            key = row_key.tolist()
    return lie(ours), lie(loaded.parameters()), key


def sleep_and_wake(run):
    """Tokens before and after sleep of both levels; where memory lies, and how many steps
    each encoded layer counted, each time."""
    llm = engine(**run, skip_tokenizer_init=True, enable_sleep_mode=True)
    tokens, places, steps = [], [], []

    def note():
        tokens.append(greedy(llm, PROMPTS))
        if is_encoded:
            places.append(llm.collective_rpc(in_pools)[0])
            steps.append(llm.apply_model(counted)[0])

    def counted(loaded):
        return [attention.secure.traffic.steps for attention in loaded.encoded]

    (is_encoded,) = llm.apply_model(lambda loaded: hasattr(loaded, "encoded"))
    note()
    llm.sleep(1)
    llm.wake_up()
    note()
    llm.sleep(2)
    llm.wake_up(tags=["weights"])
    llm.collective_rpc("reload_weights")
    llm.wake_up(tags=["kv_cache"])
    note()
    shut_down(llm)
    return tokens, places, steps


@pytest.mark.parametrize("codec", keys.CODECS)
@pytest.mark.parametrize("mode", [EAGER, COMPILED], ids=["eager", "graphs"])
def test_sleep_and_wake(mode, codec, tiny_qwen2):
    run = {"model": tiny_qwen2} | TRITON | mode
    native, *_ = in_new_process(sleep_and_wake, run)
    assert native[0] == native[1] == native[2]
    for name in ENCODED:
        env = SETTINGS[name] | {"SCX_CODEC": codec}
        tokens, places, steps = in_new_process(sleep_and_wake, run, env=env)
        assert tokens == native
        for ours, parameters, _ in places:
            assert ours
            assert not any(ours)
            assert any(parameters)
        row_keys = [key for *_, key in places]
        assert row_keys[0] == row_keys[1] == row_keys[2]
        if name == "accelerator":
            assert any(row_keys[0])
        for before, after in itertools.pairwise(steps):
            for less, more in zip(before, after, strict=True):
                assert less < more


# What a cache holds, and what another process reads of it.


@pytest.fixture(scope="module", params=[EAGER, COMPILED], ids=["eager", "graphs"])
def native_caches(request, tiny_qwen2):
    """Engine arguments, and what a native engine with them caches."""
    arguments = TRITON | request.param
    return arguments, in_new_process(caches, tiny_qwen2, arguments)


@pytest.mark.parametrize("codec", keys.CODECS)
@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_encoded_layers_alone_hold_an_encoded_cache(
    device, codec, tiny_qwen2, native_caches
):
    arguments, native = native_caches
    layers = {1, 3}
    env = {
        "SCX_ENC_LAYERS": ",".join(map(str, layers)),
        "SCX_SECURE_DEVICE": device,
        "SCX_CODEC": codec,
    }
    encoded = in_new_process(caches, tiny_qwen2, arguments, env=env)
    assert_encoded(layers, encoded, native)


def test_a_second_process_reads_what_a_first_one_stored(tiny_llama, tmp_path):
    keys = {"SCX_KEY_FILE": str(new_key_file(tmp_path / "key"))}
    plain = tmp_path / "plain"
    plain.mkdir()
    (native,) = in_new_process(run_on_store, tiny_llama, plain)
    for name in ENCODED:
        env, folder = SETTINGS[name] | keys, tmp_path / name
        first, second = (
            in_new_process(run_on_store, tiny_llama, folder, env=env)[0] for _ in range(2)
        )
        assert first == native
        assert second[0] == native[0]
        # A file for each layer is read, and most of the prompt is not computed.
        assert second[1] < len(PROMPTS[-1]) / 4 < native[1]
        assert second[2] == LAYERS


# Attention of several requests to a prefix that they share.

SHARED = [[*PROMPTS[-1], *PROMPTS[-1], i] for i in range(10)]


def cascade(model):
    """Log-probabilities, and how often vLLM took cascade attention."""
    from vllm.v1.attention.backends import flash_attn

    stock, calls = flash_attn.cascade_attention, []

    def counted(*arguments, **named):
        calls.append(1)
        return stock(*arguments, **named)

    flash_attn.cascade_attention = counted
    results = []
    for dtype in ("bfloat16", "float16"):
        llm = engine(
            model,
            skip_tokenizer_init=True,
            dtype=dtype,
            enable_prefix_caching=True,
            disable_cascade_attn=False,
            **FLASH,
        )
        # vLLM takes it where all find the prefix in the cache and add several tokens.
        greedy(llm, SHARED[:1])
        results.append(logprobs(llm, SHARED))
        shut_down(llm)
    return results, len(calls)


def test_cascade_attention(tiny_llama):
    runner = {"VLLM_USE_V2_MODEL_RUNNER": "0"}
    (rough, native), calls = in_new_process(cascade, tiny_llama, env=runner)
    assert calls > 0
    # bfloat16 has 8 times the rounding error of float16.
    error = statistics.mean(differences(rough, native))
    for name in ENCODED:
        env = SETTINGS[name] | runner
        (_, encoded), encoded_calls = in_new_process(cascade, tiny_llama, env=env)
        assert encoded_calls == calls
        assert statistics.mean(differences(encoded, native)) < error / 2


# Processes and GPUs.


def start_cuda_first(model):
    """An engine in a process of its own, of a process that has used the GPU."""
    total = torch.ones(8, device="cuda").sum().item()
    run = {"model": model, "skip_tokenizer_init": True} | TRITON
    return total, generate_each([run], PROMPTS)


def test_cuda_started_before_the_engine(tiny_llama):
    env = {
        "VLLM_ENABLE_V1_MULTIPROCESSING": "1",
        "VLLM_WORKER_MULTIPROCESSING_METHOD": "fork",
    }
    native = in_new_process(start_cuda_first, tiny_llama, env=env)
    assert native[0] == 8
    for name in ENCODED:
        result = in_new_process(start_cuda_first, tiny_llama, env=env | SETTINGS[name])
        assert result == native


@pytest.fixture(scope="module")
def native(tiny_llama):
    run = {"model": tiny_llama, "skip_tokenizer_init": True} | TRITON
    return in_new_process(generate_each, [run], PROMPTS)


@pytest.mark.gpu(2)
@pytest.mark.parametrize(
    ("device", "ranks"), [("cuda:1", 1), ("cuda:1", 2), ("cpu", 2), ("cuda", 2)]
)
def test_two_gpus(device, ranks, tiny_llama, native):
    """The second one as secure device, and a rank on each."""
    run = {"model": tiny_llama, "tensor_parallel_size": ranks} | TRITON | COMPILED
    env = {
        "SCX_ENC_LAYERS": "0,3",
        "SCX_SECURE_DEVICE": device,
        "VLLM_ENABLE_V1_MULTIPROCESSING": "1",
    }
    runs = [run | {"skip_tokenizer_init": True}]
    assert in_new_process(generate_each, runs, PROMPTS, env=env) == native


# Norms between two trips, layers with a table of one row, sinks, and experts behind it
# all. Gemma's norms have weights of another type than its rows.
@pytest.mark.parametrize(
    "name",
    [
        "Cohere2ForCausalLM",
        "Gemma3ForCausalLM",
        "GptOssForCausalLM",
        "Qwen3ForCausalLM",
        "Qwen3MoeForCausalLM",
    ],
)
@pytest.mark.parametrize("mode", [{}, COMPILED], ids=["eager", "compiled"])
def test_families_in_graphs(name, mode, tmp_path):
    model = save(tmp_path / name, name, **FAMILIES[name])
    runs = [TRITON | mode | {"model": model, "skip_tokenizer_init": True}]
    results = {
        setting: in_new_process(logprobs_each, runs, PROMPTS, env=env)[0]
        for setting, env in SETTINGS.items()
    }
    for setting in ENCODED:
        between = differences(results[setting], results["native"])
        assert len(between) > 5 * 16 * len(PROMPTS) / 2
        # As on a CPU (test_families.py): sums of float32 in another order.
        assert max(between) < 1e-3, setting
