"""One arm of the benchmark in a process of its own, and the records that it leaves.

vLLM reads plugins once a process, so each arm gets a fresh one. torch and vLLM
are imported in such processes only, after the variables are set.
"""

import json
import multiprocessing
import os
import platform
import re
import shutil
import statistics
import subprocess
import sys
import time
import zlib
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass, fields
from datetime import datetime, timezone
from importlib.metadata import version
from pathlib import Path
from typing import Any

LAYERS = r"off|all|\d{1,9}(?:,\d{1,9})*"
DEVICE = r"[a-z]+(?::\d+)?"


class UsageError(Exception):
    """What was asked for cannot be done; the text is one line that says why."""


@dataclass(frozen=True)
class Arm:
    """One setting of the plugin."""

    name: str
    layers: str
    """As in SCX_ENC_LAYERS; empty is off."""
    device: str
    """As in SCX_SECURE_DEVICE."""


NATIVE = Arm("native", "", "cpu")


def parse_arm(text: str) -> Arm:
    """The arm that LAYERS[@DEVICE] names. Raises UsageError."""
    match = re.fullmatch(f"({LAYERS})(?:@({DEVICE}))?", text)
    if match is None or (match[1] == "off" and match[2]):
        raise UsageError(
            f"arm {text!r}: allowed are LAYERS or LAYERS@DEVICE, such as 0,27 or "
            "all@cuda, and off"
        )
    layers, device = match[1], match[2] or "cpu"
    if layers == "off":
        return Arm("off", "", device)
    if layers != "all":
        layers = ",".join(map(str, sorted({int(layer) for layer in layers.split(",")})))
    return Arm(f"{layers}@{device}", layers, device)


@dataclass(frozen=True)
class Workload:
    """Prompts of equal size that are handed over at once."""

    name: str
    prompts: int
    input_tokens: int
    """Of each prompt."""
    output_tokens: int
    """For each prompt."""

    @property
    def counted_tokens(self) -> int:
        """The tokens of a run that its speed counts.

        Output alone where the name starts with ``decode``, else input and output.
        """
        decode = self.name.startswith("decode")
        return self.prompts * (self.output_tokens + (0 if decode else self.input_tokens))


WORKLOADS = {
    workload.name: workload
    for workload in (
        Workload("mixed", 64, 1024, 128),
        Workload("prefill", 16, 1024, 1),
        Workload("decode1", 1, 32, 256),
        Workload("decode64", 64, 32, 256),
    )
}


def parse_workload(text: str) -> Workload:
    """A known workload, or the one that NAME=PROMPTSxINPUT+OUTPUT says.

    Raises UsageError.
    """
    if text in WORKLOADS:
        return WORKLOADS[text]
    match = re.fullmatch(r"([A-Za-z][\w.-]*)=([1-9]\d*)x([1-9]\d*)\+([1-9]\d*)", text)
    if match is None:
        raise UsageError(
            f"workload {text!r}: allowed are {', '.join(WORKLOADS)} and "
            "NAME=PROMPTSxINPUT+OUTPUT, such as long=1x32768+1"
        )
    return Workload(match[1], *map(int, match.groups()[1:]))


@dataclass(frozen=True, kw_only=True)
class Setting:
    """All that must be equal for two speeds to be compared."""

    model: str
    """The name of the model's folder."""
    engine_args: dict[str, Any]
    in_process: bool
    """Whether the engine runs in the process that asks it."""
    warmups: int
    seed: int
    versions: dict[str, str]
    accelerator: str
    """The GPU's name, or the CPU's where there is no GPU."""
    cores: int
    """Those that this process may use."""
    commit: str | None
    """Of this package; None outside a checkout."""
    dirty: bool | None
    """Whether a tracked file differs from the commit; None outside a checkout."""


@dataclass(frozen=True, kw_only=True)
class Record(Setting):
    """What one arm did on one workload in one round."""

    arm: str
    layers: str
    device: str
    round: int
    """From 1."""
    workload: str
    prompts: int
    input_tokens: int
    """Of each prompt."""
    output_tokens: int
    """For each prompt."""
    counted_tokens: int
    """The tokens of one run that its speed counts: see Workload."""
    build_seconds: float
    """For the engine, weights, compilation and profiling included."""
    seconds: list[float]
    """Of each timed run."""
    tokens_per_second: float
    """The median over the timed runs."""
    tokens_per_second_min: float
    tokens_per_second_max: float
    cpu_ratio: list[float]
    """CPU seconds of the process and its children over wall seconds, for each run."""
    ttft_seconds: float | None
    """To the first token: the median over all requests; None where vLLM does not say."""
    tpot_seconds: float | None
    """For each token after the first, likewise."""
    crossed_bytes: int | None
    """Between accelerator and secure device in the timed runs; None for native arms."""
    utc: str
    """When the workload was finished."""

    @property
    def rates(self) -> list[float]:
        """Tokens a second of each timed run."""
        return [self.counted_tokens / seconds for seconds in self.seconds]

    @property
    def size(self) -> str:
        return f"{self.prompts}x{self.input_tokens}+{self.output_tokens}"

    @property
    def setting(self) -> dict[str, Any]:
        return {field.name: getattr(self, field.name) for field in fields(Setting)}


def append_record(record: Record, path: Path) -> None:
    """Add one line, in one write, so that an interrupted run leaves whole lines only."""
    line = json.dumps(asdict(record)) + "\n"
    with path.open("a") as file:
        file.write(line)
        file.flush()


def read_records(path: Path) -> list[Record]:
    """All records of a file. Raises UsageError."""
    try:
        lines = path.read_text().splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"cannot read {path}: {error}") from error
    records = []
    for number, line in enumerate(lines, 1):
        try:
            records.append(Record(**json.loads(line)))
        except (ValueError, TypeError) as error:
            raise UsageError(
                f"{path}, line {number} is no record of this benchmark: {error}"
            ) from error
    return records


@dataclass(frozen=True)
class Plan:
    """What every arm is to do."""

    model: Path
    workloads: list[Workload]
    repeats: int
    setting: Setting
    out: Path
    """The file to which records are appended."""


def in_new_process(function: Callable[..., Any], *args: Any) -> Any:
    """The result of `function(*args)` in a fresh interpreter."""
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, context) as pool:
        return pool.submit(function, *args).result()


def survey(arms: list[Arm]) -> dict[str, Any]:
    """The fields of Setting that this machine decides.

    Raises UsageError where scx refuses an arm, as with a device that is not
    here. For a process of its own: variables are set and CUDA is started.
    """
    from scx import __version__
    from scx.errors import SCXConfigError
    from scx.keys import scx_env_init

    for arm in arms:
        try:
            scx_env_init(arm.layers, arm.device)
        except SCXConfigError as error:
            raise UsageError(f"arm {arm.name}: {error}") from error
    import torch

    commit, dirty = git_state()
    cuda = torch.cuda.is_available()
    others = {name: version(name) for name in ("vllm", "torch", "transformers")}
    return {
        "versions": {
            "scx-vllm": __version__,
            **others,
            "python": platform.python_version(),
        },
        "accelerator": torch.cuda.get_device_name() if cuda else cpu_name(),
        "cores": len(os.sched_getaffinity(0)),
        "commit": commit,
        "dirty": dirty,
    }


def cpu_name() -> str:
    """The CPU's model, or its architecture where the system does not say more."""
    match = re.search(r"model name\s*:\s*(.+)", Path("/proc/cpuinfo").read_text())
    return match[1] if match else platform.machine()


def git_state() -> tuple[str | None, bool | None]:
    """The commit of this package and whether a tracked file differs from it.

    Untracked files do not count: the results of an earlier command are such.
    """
    git = shutil.which("git")
    if git is None:
        return None, None
    describe = ["describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
    folder = str(Path(__file__).parent)
    run = subprocess.run(  # noqa: S603
        [git, "-C", folder, *describe], capture_output=True, text=True
    )
    if run.returncode != 0:
        return None, None
    commit, _, dirty = run.stdout.strip().partition("-")
    return commit, bool(dirty)


def run_arm(arm: Arm, round_number: int, plan: Plan) -> None:
    """Build one engine, run all workloads and append a record after each.

    For a process of its own.
    """
    set_variables(arm, plan.setting.in_process)
    from vllm import LLM

    start = time.perf_counter()
    llm = LLM(model=str(plan.model), **plan.setting.engine_args)
    build_seconds = time.perf_counter() - start
    try:
        for workload in plan.workloads:
            record = Record(
                **asdict(plan.setting),
                **measure(llm, arm, workload, plan),
                arm=arm.name,
                layers=arm.layers,
                device=arm.device,
                round=round_number,
                build_seconds=build_seconds,
                utc=datetime.now(timezone.utc).isoformat(timespec="seconds"),
            )
            append_record(record, plan.out)
            speed = f"{record.tokens_per_second:,.1f} tokens/s"
            print(f"  {workload.name}: {speed}", file=sys.stderr, flush=True)
    finally:
        # This process would wait for the engine's at its end, for ever.
        llm.llm_engine.engine_core.shutdown()


def set_variables(arm: Arm, in_process: bool) -> None:
    """Set what vLLM and the plugin read, before vLLM is imported."""
    from scx.keys import scx_env_init

    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = str(int(not in_process))
    # The counters are asked for by a function that is sent to the workers.
    os.environ["VLLM_ALLOW_INSECURE_SERIALIZATION"] = "1"
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
    os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "2")
    scx_env_init(arm.layers, arm.device)


def measure(llm: Any, arm: Arm, workload: Workload, plan: Plan) -> dict[str, Any]:
    """The fields of Record that say what was run and measured, after the warm-ups."""
    warmups, seed = plan.setting.warmups, plan.setting.seed
    vocabulary = llm.llm_engine.model_config.get_vocab_size()

    def run(number: int) -> Run:
        return timed_run(
            llm, workload, random_prompts(workload, vocabulary, seed, number)
        )

    for number in range(warmups):
        run(number)
    crossed = crossed_so_far(llm) if arm.layers else None
    runs = [run(warmups + number) for number in range(plan.repeats)]
    stats = [stats for run in runs for stats in run.stats]
    rates = [workload.counted_tokens / run.seconds for run in runs]
    return {
        "workload": workload.name,
        "prompts": workload.prompts,
        "input_tokens": workload.input_tokens,
        "output_tokens": workload.output_tokens,
        "counted_tokens": workload.counted_tokens,
        "seconds": [run.seconds for run in runs],
        "tokens_per_second": statistics.median(rates),
        "tokens_per_second_min": min(rates),
        "tokens_per_second_max": max(rates),
        "cpu_ratio": [run.cpu_seconds / run.seconds for run in runs],
        "ttft_seconds": median(map(first_token_seconds, stats)),
        "tpot_seconds": median(map(later_token_seconds, stats)),
        "crossed_bytes": None if crossed is None else crossed_so_far(llm) - crossed,
    }


def random_prompts(
    workload: Workload, vocabulary: int, seed: int, number: int
) -> list[dict[str, list[int]]]:
    """The prompts of run `number`: the same for every arm, each unlike the others."""
    import numpy as np

    generator = np.random.default_rng([seed, zlib.crc32(workload.name.encode()), number])
    size = (workload.prompts, workload.input_tokens)
    tokens = generator.integers(vocabulary, size=size).tolist()
    return [{"prompt_token_ids": prompt} for prompt in tokens]


@dataclass(frozen=True)
class Run:
    """One timed run."""

    seconds: float
    cpu_seconds: float
    stats: list[Any]
    """vLLM's RequestStateStats of each request, or None."""


def timed_run(llm: Any, workload: Workload, prompts: list[Any]) -> Run:
    """Generate once. Raises RuntimeError where tokens are missing."""
    from vllm import SamplingParams

    length = workload.output_tokens
    sampling = SamplingParams(
        temperature=0,
        ignore_eos=True,
        min_tokens=length,
        max_tokens=length,
        detokenize=False,
    )
    cpu_start, start = cpu_seconds(), time.perf_counter()
    outputs = llm.generate(prompts, sampling, use_tqdm=False)
    seconds, cpu = time.perf_counter() - start, cpu_seconds() - cpu_start
    tokens = sum(len(output.outputs[0].token_ids) for output in outputs)
    if tokens != workload.prompts * length:
        raise RuntimeError(f"{tokens} output tokens, not {workload.prompts} x {length}")
    return Run(seconds, cpu, [output.metrics for output in outputs])


def cpu_seconds() -> float:
    """User and system seconds of this process and of all that it started.

    They come in steps of a clock tick, mostly 10 ms. Not getrusage: that counts
    children only after they ended, and the engine lives on.
    """
    import psutil

    process = psutil.Process()
    times = [each.cpu_times() for each in (process, *process.children(recursive=True))]
    return sum(each.user + each.system for each in times)


def median(values: Any) -> float | None:
    """Of those values that are not None; None where there are none."""
    known = [value for value in values if value is not None]
    return statistics.median(known) if known else None


def first_token_seconds(stats: Any) -> float | None:
    """From a request's arrival to its first token, waiting included."""
    return getattr(stats, "first_token_latency", None)


def later_token_seconds(stats: Any) -> float | None:
    """For each token of a request after its first."""
    if stats is None or stats.num_generation_tokens < 2:
        return None
    seconds = stats.last_token_ts - stats.first_token_ts
    return seconds / (stats.num_generation_tokens - 1)


def crossed_so_far(llm: Any) -> int:
    """Bytes between accelerator and secure device since the engine was built."""
    return sum(llm.apply_model(crossed_bytes))


def crossed_bytes(model: Any) -> int:
    """The same on one rank; it runs in the worker."""
    counters = [layer.secure.traffic for layer in model.encoded]
    return sum(traffic.bytes_in + traffic.bytes_out for traffic in counters)
