"""Engines that wait for work, each in processes of its own, and the work that they do.

vLLM reads plugins once per process, so each arm has its own. torch and vLLM are
imported in such processes only, after the variables are set.
"""

import contextlib
import multiprocessing
import os
import re
import signal
import statistics
import sys
import threading
import time
import zlib
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from datetime import datetime, timezone
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, NoReturn

from benchmark_throughput.records import Arm, Record, Setting, Workload
from lab.processes import ArmFailed, end_with_parent
from scx.keys import scx_env_init

POLL_SECONDS = 1.0
CLOSE_SECONDS = 60.0
ERROR = re.compile(r"[\w.]*(Error|Exception): .*\S")


@dataclass(frozen=True)
class Plan:
    """What every arm is to do."""

    model: Path
    workloads: list[Workload]
    repeats: int
    """Rounds, in each of which every arm runs a workload once."""
    setting: Setting
    started: str
    out: Path
    """The file to which records are appended."""


@dataclass(frozen=True)
class Run:
    """What one arm did on one workload in one round."""

    seconds: float
    cpu_seconds: float
    ttft: list[float]
    """Seconds to the first token of each request; empty where vLLM does not say."""
    tpot: list[float]
    """Seconds for each token after the first, likewise."""
    crossed_bytes: int | None
    """Between accelerator and secure device; None where no layer is encoded."""


class ResidentArm:
    """An engine that was built once, in processes of its own, and waits for work.

    They are a process group, so that none of them outlives `close`. A Ctrl-C
    does not reach them, and they are killed when this process is gone.
    """

    def __init__(self, arm: Arm, plan: Plan) -> None:
        """Start to build the engine."""
        context = multiprocessing.get_context("spawn")
        self.arm = arm
        self.build_seconds = 0.0
        self._pipe, remote = context.Pipe()
        stderr, writer = context.Pipe(duplex=False)
        self._stderr = StderrRelay(stderr)
        self._process = context.Process(
            target=with_stderr, args=(writer, serve, remote, arm, plan)
        )
        self._process.start()
        for end in (remote, writer):
            end.close()

    def wait_until_built(self) -> None:
        """Raises ArmFailed."""
        self.build_seconds = self._answer()

    def run(self, workload: Workload, number: int) -> Run:
        """Run one workload on the prompts of that number. Raises ArmFailed."""
        # Where nobody listens any more, the answer says why.
        with contextlib.suppress(ConnectionError):
            self._pipe.send((workload, number))
        return self._answer()

    def terminate(self) -> None:
        """Tell the engine to end, and do not wait for it."""
        self._process.terminate()

    def close(self) -> None:
        """End the engine and all its processes; safe to call again."""
        if self._pipe.closed:
            return
        self.terminate()
        try:
            self._process.join(CLOSE_SECONDS)
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self._process.pid, signal.SIGKILL)
            self._process.join()
            self._pipe.close()

    def _answer(self) -> Any:
        answer = self._receive()
        if isinstance(answer, ArmFailed):
            self.close()
            first = self._stderr.first_error()
            if first is not None and first not in str(answer):
                answer = ArmFailed(f"{answer}; its first error: {first}")
            raise answer
        return answer

    def _receive(self) -> Any:
        # Not by waiting for the pipe's end: an engine that outlives its process
        # may hold a copy of it.
        alive = True
        while alive:
            alive = self._process.is_alive()
            if self._pipe.poll(POLL_SECONDS):
                with contextlib.suppress(EOFError, ConnectionError):
                    return self._pipe.recv()
                self._process.join(CLOSE_SECONDS)
                break
        return ArmFailed(f"its process ended with status {self._process.exitcode}")


class StderrRelay:
    """Passes on what an arm's processes write to stderr, and keeps the first error.

    vLLM says why an engine did not start in the log of that engine alone.
    """

    def __init__(self, reader: Connection) -> None:
        self._first_error: str | None = None
        self._thread = threading.Thread(target=self._pass_on, args=[reader], daemon=True)
        self._thread.start()

    def first_error(self) -> str | None:
        """Once all the processes have ended."""
        self._thread.join(POLL_SECONDS)
        return self._first_error

    def _pass_on(self, reader: Connection) -> None:
        with reader, open(reader.fileno(), errors="replace", closefd=False) as lines:
            for line in lines:
                sys.stderr.write(line)
                if self._first_error is None and (found := ERROR.search(line)):
                    self._first_error = found[0]


def with_stderr(writer: Connection, function: Callable[..., None], *args: Any) -> None:
    """Call a function, with `writer` as stderr of this process and of all it starts."""
    with writer:
        os.dup2(writer.fileno(), sys.stderr.fileno())
    function(*args)


def serve(pipe: Connection, arm: Arm, plan: Plan) -> None:
    """Build an engine, then answer each (workload, number) with a Run."""
    os.setpgrp()
    end_with_parent()
    signal.signal(signal.SIGTERM, exit_once)
    try:
        with built_engine(arm, plan) as (llm, build_seconds):
            pipe.send(build_seconds)
            # Where the asking process is gone, there is no more to do.
            with contextlib.suppress(EOFError):
                while True:
                    workload, number = pipe.recv()
                    pipe.send(run_once(llm, arm, workload, plan.setting.seed, number))
    except Exception as error:
        reason = str(error).strip() or type(error).__name__
        pipe.send(ArmFailed(reason.splitlines()[-1]))
        raise


def exit_once(number: int, _frame: Any) -> NoReturn:
    """A second signal would interrupt the engine's end."""
    signal.signal(number, signal.SIG_IGN)
    sys.exit()


@contextlib.contextmanager
def built_engine(arm: Arm, plan: Plan) -> Iterator[tuple[Any, float]]:
    """A vllm.LLM and the seconds that it took to build it."""
    set_variables(arm, plan.setting)
    from vllm import LLM

    start = time.perf_counter()
    llm = LLM(model=str(plan.model), **plan.setting.engine_args)
    try:
        yield llm, time.perf_counter() - start
    finally:
        # This process would wait for the engine's at its end, for ever.
        llm.llm_engine.engine_core.shutdown()


def set_variables(arm: Arm, setting: Setting) -> None:
    """Set what vLLM and the plugin read, before vLLM is imported."""
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = str(int(not setting.in_process))
    # The counters are asked for by a function that is sent to the workers.
    os.environ["VLLM_ALLOW_INSECURE_SERIALIZATION"] = "1"
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
    if "kv_cache_memory_bytes" in setting.engine_args:
        # On CPUs the variable would win over the argument.
        os.environ.pop("VLLM_CPU_KVCACHE_SPACE", None)
    else:
        os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "2")
    scx_env_init(arm.layers, arm.device, codec=arm.codec)


def run_once(llm: Any, arm: Arm, workload: Workload, seed: int, number: int) -> Run:
    """Generate once from random prompts. Raises RuntimeError where tokens are missing."""
    vocabulary = llm.llm_engine.model_config.get_vocab_size()
    prompts = random_prompts(workload, vocabulary, seed, number)
    return timed_run(llm, arm, workload, prompts)


def timed_run(llm: Any, arm: Arm, workload: Workload, prompts: list[Any]) -> Run:
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
    crossed = crossed_so_far(llm) if arm.layers else None
    cpu_start, start = cpu_seconds(), time.perf_counter()
    outputs = llm.generate(prompts, sampling, use_tqdm=False)
    seconds, cpu = time.perf_counter() - start, cpu_seconds() - cpu_start
    tokens = sum(len(output.outputs[0].token_ids) for output in outputs)
    if tokens != workload.prompts * length:
        raise RuntimeError(f"{tokens} output tokens, not {workload.prompts} x {length}")
    stats = [output.metrics for output in outputs]
    return Run(
        seconds,
        cpu,
        known(map(first_token_seconds, stats)),
        known(map(later_token_seconds, stats)),
        None if crossed is None else crossed_so_far(llm) - crossed,
    )


def random_prompts(
    workload: Workload, vocabulary: int, seed: int, number: int
) -> list[dict[str, list[int]]]:
    """The prompts of run `number`: the same for every arm, each unlike the others."""
    import numpy as np

    generator = np.random.default_rng([seed, zlib.crc32(workload.name.encode()), number])
    size = (workload.prompts, workload.input_tokens)
    tokens = generator.integers(vocabulary, size=size).tolist()
    return [{"prompt_token_ids": prompt} for prompt in tokens]


def cpu_seconds() -> float:
    """User and system seconds of this process and of all that it started.

    They come in steps of a clock tick, mostly 10 ms. Not getrusage: that counts
    children only after they ended, and the engine lives on.
    """
    import psutil

    process = psutil.Process()
    times = [each.cpu_times() for each in (process, *process.children(recursive=True))]
    return sum(each.user + each.system for each in times)


def known(values: Any) -> list[float]:
    """Those that are not None."""
    return [value for value in values if value is not None]


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


def make_record(
    plan: Plan, arm: Arm, build_seconds: float, workload: Workload, runs: list[Run]
) -> Record:
    """What an arm did on a workload: one run for each round."""
    rates = [workload.counted_tokens / run.seconds for run in runs]
    crossed = sum(run.crossed_bytes for run in runs) if arm.layers else None
    return Record(
        **asdict(plan.setting),
        started=plan.started,
        arm=arm.name,
        layers=arm.layers,
        device=arm.device,
        codec=arm.codec,
        workload=workload.name,
        prompts=workload.prompts,
        input_tokens=workload.input_tokens,
        output_tokens=workload.output_tokens,
        counted_tokens=workload.counted_tokens,
        build_seconds=build_seconds,
        seconds=[run.seconds for run in runs],
        tokens_per_second=statistics.median(rates),
        tokens_per_second_min=min(rates),
        tokens_per_second_max=max(rates),
        cpu_ratio=[run.cpu_seconds / run.seconds for run in runs],
        ttft_seconds=median(seconds for run in runs for seconds in run.ttft),
        tpot_seconds=median(seconds for run in runs for seconds in run.tpot),
        crossed_bytes=crossed,
        utc=datetime.now(timezone.utc).isoformat(timespec="seconds"),
    )


def median(values: Iterator[float]) -> float | None:
    """None where there are none."""
    values = list(values)
    return statistics.median(values) if values else None
