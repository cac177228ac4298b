"""Real engines, each setting of the variables in a process of its own.

One process holds one setting (vLLM reads plugins once), but any number of
engines. vLLM is imported in one server process, from which the children fork: its
plugins are not loaded there, and what it reads of the variables it reads later.
"""

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from lab import processes

_IMPORTED = ("vllm.entrypoints.llm", "vllm.v1.engine.core", "vllm.v1.worker.worker_base")

# vLLM's Triton attention multiplies float32 in TF32, that is rounded by 2^-11, unless
# this is Triton's default for it. Where sums differ in their last bits so do roundings,
# then, and native tokens too where other requests run beside.
EXACT_FLOAT32 = "ieee"

ENGINE_ARGS = {
    "dtype": "float32",
    "enforce_eager": True,
    "max_model_len": 1024,
    "num_gpu_blocks_override": 128,
    # On a GPU nothing is profiled, so that other engines may start and end meanwhile.
    "gpu_memory_utilization": 0.1,
    "kv_cache_memory_bytes": 256 << 20,
    "enable_prefix_caching": False,
    "disable_log_stats": True,
}


def in_new_process(
    function: Callable[..., Any], *args: Any, env: dict[str, str] | None = None
) -> Any:
    """As that of lab.processes, with variables for engines and those of `env` set."""
    settings = {
        "VLLM_CPU_KVCACHE_SPACE": "1",
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
        "VLLM_LOGGING_LEVEL": "ERROR",
        "HF_HUB_OFFLINE": "1",
        "TRITON_F32_DEFAULT": EXACT_FLOAT32,
        "SCX_ENC_LAYERS": "",
    }
    variables = os.environ | settings | (env or {})
    return processes.in_new_process(function, *args, env=variables, preload=_IMPORTED)


def engine(model: Path, **engine_args: Any) -> Any:
    from vllm import LLM

    return LLM(model=str(model), **(ENGINE_ARGS | engine_args))


def configure_each(
    cases: list[tuple[dict[str, Any], dict[str, str]]],
) -> list[tuple[str, Any]]:
    """For each (engine arguments, variables): error type and text, or scx's record."""
    from vllm.engine.arg_utils import EngineArgs

    results: list[tuple[str, Any]] = []
    for arguments, variables in cases:
        before = dict(os.environ)
        os.environ.update(variables)
        try:
            engine_args = EngineArgs(skip_tokenizer_init=True, **arguments)
            record = engine_args.create_engine_config().additional_config.get("scx")
            results.append(("configured", record))
        except Exception as error:  # whatever it is, it is the outcome
            results.append((type(error).__name__, str(error)))
        os.environ.clear()
        os.environ.update(before)
    return results


def greedy(
    llm: Any, prompts: list[Any], max_tokens: int = 16, **sampling: Any
) -> list[list[int]]:
    """Token ids for text prompts or lists of token ids."""
    from vllm import SamplingParams

    params = SamplingParams(
        temperature=0, max_tokens=max_tokens, ignore_eos=True, **sampling
    )
    inputs = [{"prompt_token_ids": p} if isinstance(p, list) else p for p in prompts]
    outputs = llm.generate(inputs, params, use_tqdm=False)
    return [list(output.outputs[0].token_ids) for output in outputs]


def watch_rows(llm: Any) -> list[int]:
    """A list that grows by the rows of each call of layer 0's projection from now on."""
    rows: list[int] = []

    def watch(loaded: Any) -> None:
        projection = loaded.model.layers[0].self_attn.qkv_proj
        projection.register_forward_pre_hook(lambda _, args: rows.append(len(args[0])))

    llm.apply_model(watch)
    return rows


def shut_down(llm: Any) -> None:
    """End an engine so that another can start in the same process."""
    from vllm.distributed import cleanup_dist_env_and_memory

    llm.llm_engine.engine_core.shutdown()
    del llm
    cleanup_dist_env_and_memory()


def generate_each(
    runs: list[dict[str, Any]], prompts: list[Any], max_tokens: int = 16
) -> list[list[list[int]]]:
    """Greedy tokens of one engine after another; a run is a dict of engine arguments."""
    results = []
    for run in runs:
        llm = engine(**run)
        results.append(greedy(llm, prompts, max_tokens))
        shut_down(llm)
    return results


def logprobs(
    llm: Any, prompts: list[list[int]], max_tokens: int = 16
) -> list[list[dict[int, float]]]:
    """For each greedy token the 20 likeliest with their log-probabilities."""
    from vllm import SamplingParams

    params = SamplingParams(
        temperature=0, max_tokens=max_tokens, ignore_eos=True, logprobs=20
    )
    inputs = [{"prompt_token_ids": prompt} for prompt in prompts]
    return [
        [
            {token: entry.logprob for token, entry in position.items()}
            for position in output.outputs[0].logprobs
        ]
        for output in llm.generate(inputs, params, use_tqdm=False)
    ]


def logprobs_each(
    runs: list[dict[str, Any]], prompts: list[Any]
) -> list[list[list[dict[int, float]]]]:
    """As generate_each, with what `logprobs` says."""
    results = []
    for run in runs:
        llm = engine(**run)
        results.append(logprobs(llm, prompts))
        shut_down(llm)
    return results


def differences(
    result: list[list[dict[int, float]]], reference: list[list[dict[int, float]]]
) -> list[float]:
    """Of the five likeliest tokens' log-probabilities, where both list them, up to where
    the texts part."""
    found = []
    for ours, theirs in zip(result, reference, strict=True):
        for mine, other in zip(ours, theirs, strict=True):
            likeliest = sorted(other, key=other.get, reverse=True)[:5]
            found += [
                abs(mine[token] - other[token]) for token in likeliest if token in mine
            ]
            if max(mine, key=mine.get) != likeliest[0]:
                break
    return found
