"""Latency under load: `vllm bench serve` against `vllm serve`, plain and encoded.

    python -m benchmark_throughput.serve --model PATH --arm 0,27 --request-rate 4

One server after another, each with its own setting of the plugin and the same
random prompts. What vLLM's benchmark saved of each is kept as it is; the table
shows percentiles of the time to the first token (TTFT), for each later token
(TPOT) and between tokens (ITL). Arguments after -- go to `vllm serve`.
"""

import argparse
import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from benchmark_throughput.compare import RESULTS, say
from benchmark_throughput.options import distinct, survey_for
from benchmark_throughput.records import NATIVE, Arm, parse_arm
from lab.cli import Parser, UsageError, natural, positive
from lab.processes import in_new_process, interruptible
from lab.tables import as_markdown

START_SECONDS = 900
CLOSE_SECONDS = 60
PERCENTILES = ("50", "90", "99")
METRICS = ("ttft", "tpot", "itl")


def parser() -> Parser:
    parser = Parser(prog="python -m benchmark_throughput.serve", description=__doc__)
    parser.add_argument("--model", type=Path, required=True, metavar="PATH")
    parser.add_argument(
        "--arm",
        action="append",
        default=[],
        metavar="LAYERS[@DEVICE]",
        help="as of compare; repeatable",
    )
    parser.add_argument("--num-prompts", type=positive, default=64, help="(default: 64)")
    parser.add_argument("--input-len", type=positive, default=1024, help="(1024)")
    parser.add_argument("--output-len", type=positive, default=128, help="(128)")
    parser.add_argument(
        "--request-rate", default="inf", help="requests a second (default: all at once)"
    )
    parser.add_argument("--max-concurrency", type=positive, help="(default: no limit)")
    parser.add_argument("--seed", type=natural, default=0)
    parser.add_argument(
        "--out", type=Path, metavar="FOLDER", help="(default: in results/)"
    )
    parser.add_argument("server", nargs="*", metavar="-- ARGUMENT")
    return parser


def free_port() -> int:
    with socket.socket() as chosen:
        chosen.bind(("127.0.0.1", 0))
        return chosen.getsockname()[1]


@contextlib.contextmanager
def server(arm: Arm, model: Path, arguments: list[str], log: Path) -> Iterator[str]:
    """The address of a `vllm serve` with `arguments` that is ready.

    Raises UsageError where it ends before that.
    """
    port = free_port()
    address = f"http://127.0.0.1:{port}"
    command = [*vllm("serve", str(model.resolve())), f"--port={port}", *arguments]
    variables = {
        "SCX_ENC_LAYERS": arm.layers,
        "SCX_SECURE_DEVICE": arm.device,
        "SCX_CODEC": arm.codec,
    }
    with log.open("w") as file:
        process = subprocess.Popen(  # noqa: S603
            command,
            stdout=file,
            stderr=file,
            env=os.environ | variables,
            start_new_session=True,
        )
    try:
        deadline = time.monotonic() + START_SECONDS
        while not is_ready(address):
            if process.poll() is not None or time.monotonic() > deadline:
                raise UsageError(f"arm {arm.name}: the server did not start; see {log}")
            time.sleep(1)
        yield address
    finally:
        process.terminate()
        try:
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(CLOSE_SECONDS)
        finally:
            # Its engine's processes too.
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def vllm(*arguments: str) -> list[str]:
    """vLLM's command, of this interpreter's environment."""
    return [sys.executable, "-m", "vllm.entrypoints.cli.main", *arguments]


def is_ready(address: str) -> bool:
    try:
        with urllib.request.urlopen(f"{address}/health", timeout=5) as answer:  # noqa: S310
            return answer.status == 200
    except (urllib.error.URLError, ConnectionError, TimeoutError):
        return False


def bench(arm: Arm, address: str, options: argparse.Namespace, out: Path) -> None:
    """Leave vLLM's own JSON for this arm in `out`. Raises UsageError."""
    name = f"{arm.name}.json"
    command = [
        *vllm("bench", "serve"),
        f"--base-url={address}",
        f"--model={options.model.resolve()}",
        "--dataset-name=random",
        f"--random-input-len={options.input_len}",
        f"--random-output-len={options.output_len}",
        f"--num-prompts={options.num_prompts}",
        f"--request-rate={options.request_rate}",
        f"--seed={options.seed}",
        "--ignore-eos",
        "--temperature=0",
        f"--percentile-metrics={','.join(METRICS)}",
        f"--metric-percentiles={','.join(PERCENTILES)}",
        "--save-result",
        f"--result-dir={out}",
        f"--result-filename={name}",
    ]
    if options.max_concurrency is not None:
        command.append(f"--max-concurrency={options.max_concurrency}")
    log = out / f"{arm.name}.bench.log"
    with log.open("w") as file:
        done = subprocess.run(command, stdout=file, stderr=file)  # noqa: S603
    result = out / name
    if done.returncode != 0 or not result.is_file():
        raise UsageError(f"arm {arm.name}: the benchmark did not finish; see {log}")
    found = json.loads(result.read_text())
    if found["completed"] != options.num_prompts:
        raise UsageError(
            f"arm {arm.name}: {found['completed']} of {options.num_prompts} requests "
            f"were answered; see {log}"
        )


def table(results: dict[str, dict[str, Any]]) -> list[list[str]]:
    """Rows of cells, the head first; milliseconds, and output tokens per second."""
    columns = [f"p{p}_{metric}_ms" for metric in METRICS for p in PERCENTILES]
    head = [f"{metric.upper()} p{p}" for metric in METRICS for p in PERCENTILES]
    return [
        ["arm", "output tokens/s", *head],
        *(
            [
                arm,
                f"{result['output_throughput']:,.1f}",
                *(f"{result[column]:,.2f}" for column in columns),
            ]
            for arm, result in results.items()
        ),
    ]


def benchmark(options: argparse.Namespace) -> dict[str, dict[str, Any]]:
    """What vLLM's benchmark saved of each arm, by the arm's name. Raises UsageError."""
    arms = distinct("arm", [NATIVE, *map(parse_arm, options.arm)])
    if not (options.model / "config.json").is_file():
        raise UsageError(f"--model {options.model}: no folder with a config.json")
    started = f"{datetime.now(timezone.utc):%Y%m%dT%H%M%SZ}"
    out = options.out or RESULTS / f"{options.model.resolve().name}-serve-{started}"
    out.mkdir(parents=True, exist_ok=True)
    described = in_new_process(survey_for, arms) | {"command": sys.argv[1:]}
    (out / "setting.json").write_text(json.dumps(described, indent=2) + "\n")
    results = {}
    arguments = [f"--seed={options.seed}", "--no-enable-prefix-caching"]
    arguments += options.server
    for arm in arms:
        log = out / f"{arm.name}.server.log"
        with server(arm, options.model, arguments, log) as address:
            say(f"arm {arm.name}: serving at {address}")
            bench(arm, address, options, out)
        results[arm.name] = json.loads((out / f"{arm.name}.json").read_text())
    return results


def main() -> int:
    cli = parser()
    options = cli.parse_args()
    try:
        with interruptible():
            results = benchmark(options)
    except UsageError as error:
        cli.error(str(error))
    except KeyboardInterrupt:
        say("interrupted; the files of finished arms are kept")
        return 130
    print(as_markdown(table(results)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
