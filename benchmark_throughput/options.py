"""Options that the benchmarks share, and what comes of them."""

import argparse
import json
import reprlib
from pathlib import Path
from typing import Any

from benchmark_throughput.records import Arm, Setting
from lab.cli import UsageError
from lab.processes import in_new_process
from lab.provenance import survey
from scx.errors import SCXConfigError
from scx.keys import scx_env_init


def distinct(kind: str, items: list[Any]) -> list[Any]:
    """The same items. Raises UsageError where two have one name."""
    names = [item.name for item in items]
    if repeated := [name for name in names if names.count(name) > 1]:
        raise UsageError(f"{kind} {repeated[0]!r} is given more than once")
    return items


def add_engine_options(group: Any) -> None:
    """Those that mean the same in every benchmark."""
    group.add_argument("--dtype", default="bfloat16", help="(default: bfloat16)")
    group.add_argument("--load-format", help="dummy, for example: random weights")
    group.add_argument("--enforce-eager", action="store_true")
    group.add_argument("--attention-backend")


def engine_args(options: argparse.Namespace) -> dict[str, Any]:
    """The arguments of vllm.LLM, model aside; vLLM's defaults where none is given."""
    arguments = {
        "dtype": options.dtype,
        "max_model_len": options.max_model_len,
        "tensor_parallel_size": options.tensor_parallel_size,
        "enforce_eager": options.enforce_eager,
        "seed": options.seed,
        # Prompts are token ids and so is what is read of the outputs.
        "skip_tokenizer_init": True,
        # A repeated run must not be cheaper than the first.
        "enable_prefix_caching": False,
        # Without statistics, requests carry no times.
        "disable_log_stats": False,
    }
    optional = (
        "gpu_memory_utilization",
        "kv_cache_memory_bytes",
        "load_format",
        "attention_backend",
        "max_num_batched_tokens",
    )
    given = {name: getattr(options, name, None) for name in optional}
    return arguments | {name: value for name, value in given.items() if value is not None}


def read_num_hidden_layers(model: Path) -> int:
    """From a model's config.json. Raises UsageError."""
    try:
        config = json.loads((model / "config.json").read_text())
        layers = (config.get("text_config") or config)["num_hidden_layers"]
    except (OSError, ValueError, KeyError, AttributeError, TypeError) as error:
        raise UsageError(
            f"--model {model}: no folder with a config.json that has num_hidden_layers"
        ) from error
    if type(layers) is not int or layers < 1:
        raise UsageError(
            f"--model {model}: num_hidden_layers={reprlib.repr(layers)} in config.json: "
            "a whole number from 1 is allowed"
        )
    return layers


def make_setting(
    options: argparse.Namespace, arms: list[Arm], num_hidden_layers: int, in_process: bool
) -> Setting:
    """What the options and this machine decide. Raises UsageError where an arm is
    refused here."""
    return Setting(
        model=options.model.resolve().name,
        num_hidden_layers=num_hidden_layers,
        engine_args=engine_args(options),
        in_process=in_process,
        warmups=options.warmups,
        seed=options.seed,
        **in_new_process(survey_for, arms),
    )


def survey_for(arms: list[Arm]) -> dict[str, Any]:
    """The fields of Setting that this machine decides.

    Raises UsageError if scx refuses an arm, as with a device that is not here. For a
    process of its own: variables are set and CUDA is started.
    """
    for arm in arms:
        try:
            scx_env_init(arm.layers, arm.device, codec=arm.codec)
        except SCXConfigError as error:
            raise UsageError(f"arm {arm.name}: {error}") from error
    return survey()
