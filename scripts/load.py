"""A thousand requests against `vllm serve`, native and then encoded.

    python -m scripts.load          writes docs/load.json

Requests of mixed lengths on a tiny random model, in float32 and at temperature 0,
many at once; a tenth are streams that the client closes part way. Each finished
answer must be the native one, no request may be lost, and after warm-up the memory of
the server's processes must not grow more than that of the native one.
The exit status is 1 where that is not so.
"""

import argparse
import asyncio
import itertools
import json
import os
import random
import statistics
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import openai
import psutil

from benchmark_throughput.options import survey_for
from benchmark_throughput.records import NATIVE, Arm, parse_arm
from benchmark_throughput.serve import server
from lab.cli import Parser
from lab.engines import EXACT_FLOAT32
from lab.processes import in_new_process, interruptible
from lab.tiny_models import SHAPE, VOCABULARY, save

CONCURRENCY = 32
ABORTED_SHARE = 0.1
PROMPT_TOKENS = (1, 400)
OUTPUT_TOKENS = (4, 48)
SERVER = [
    "--dtype=float32",
    "--max-model-len=512",
    "--num-gpu-blocks-override=160",
    f"--max-num-seqs={CONCURRENCY}",
    "--skip-tokenizer-init",
    "--served-model-name=model",
]
ENVIRONMENT = {
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "HF_HUB_OFFLINE": "1",
    "TRITON_F32_DEFAULT": EXACT_FLOAT32,
    # oneDNN would keep what it makes for each number of rows, up to 1,024 of them, and
    # a server's memory would grow by that for thousands of requests.
    "ONEDNN_PRIMITIVE_CACHE_CAPACITY": "1",
}
ENCODED = parse_arm("0,3")

REQUEST_SECONDS = 120
IDLE_SECONDS = 30
POLL_SECONDS = 0.2
WARM_UP_TENTHS = 4
# Beyond the native growth, of all processes together. A single leaked row of hidden
# states for each token would be more than this.
GROWTH_MIB = 16
DOCS = Path(__file__).parent.parent / "docs"


@dataclass(frozen=True)
class Request:
    prompt: list[int]
    max_tokens: int
    stream: bool
    abort_after: int | None
    """Tokens after which the client closes the stream."""


@dataclass
class Answer:
    tokens: list[int] = field(default_factory=list)
    finished: bool = False
    aborted: bool = False
    error: str | None = None


def make_requests(count: int, seed: int) -> list[Request]:
    """The same for both arms. Those to abort are longer than they will be let."""
    draw = random.Random(seed)  # noqa: S311
    aborted = set(draw.sample(range(count), round(count * ABORTED_SHARE)))
    requests = []
    for index in range(count):
        prompt = [draw.randrange(VOCABULARY) for _ in range(draw.randint(*PROMPT_TOKENS))]
        length = draw.randint(*OUTPUT_TOKENS)
        if index in aborted:
            requests.append(Request(prompt, 2 * OUTPUT_TOKENS[1], True, length))
        else:
            requests.append(Request(prompt, length, draw.random() < 0.5, None))
    return requests


async def ask(client: openai.AsyncOpenAI, request: Request) -> Answer:
    """What came of one request; an error of the client is one of the answer."""
    answer = Answer()
    try:
        response = await client.completions.create(
            model="model",
            prompt=request.prompt,
            max_tokens=request.max_tokens,
            temperature=0,
            stream=request.stream,
            extra_body={"ignore_eos": True, "return_token_ids": True},
        )
        if isinstance(response, openai.AsyncStream):
            async for chunk in response:
                _take(answer, chunk.choices)
                if request.abort_after and len(answer.tokens) >= request.abort_after:
                    await response.close()
                    answer.aborted = True
                    break
        else:
            _take(answer, response.choices)
    except openai.OpenAIError as error:
        answer.error = f"{type(error).__name__}: {error}"
    return answer


def _take(answer: Answer, choices: Sequence[Any]) -> None:
    for choice in choices:
        answer.tokens += choice.token_ids or []
        answer.finished |= choice.finish_reason == "length"


async def send_all(
    address: str, requests: list[Request]
) -> tuple[list[Answer], list[float]]:
    """All answers, and the server's memory in MiB after each of them."""
    # A ready server has started all its processes, and this one has no others.
    processes = psutil.Process().children(recursive=True)
    answers: dict[int, Answer] = {}
    held = []
    left = iter(enumerate(requests))

    async def work(client: openai.AsyncOpenAI) -> None:
        for index, request in left:
            answers[index] = await ask(client, request)
            held.append(sum(p.memory_info().rss for p in processes) / 2**20)

    async with openai.AsyncOpenAI(
        base_url=f"{address}/v1", api_key="none", max_retries=0, timeout=REQUEST_SECONDS
    ) as client:
        await asyncio.gather(*(work(client) for _ in range(CONCURRENCY)))
    return [answers[index] for index in range(len(requests))], held


def left_in_server(address: str) -> float:
    """Requests that the server still has, after a while to give them up."""
    deadline = time.monotonic() + IDLE_SECONDS
    while True:
        with urllib.request.urlopen(f"{address}/metrics", timeout=10) as page:  # noqa: S310
            lines = page.read().decode().splitlines()
        names = ("vllm:num_requests_running{", "vllm:num_requests_waiting{")
        left = sum(float(line.split()[-1]) for line in lines if line.startswith(names))
        if not left or time.monotonic() > deadline:
            return left
        time.sleep(POLL_SECONDS)


def run(
    arm: Arm, model: Path, arguments: list[str], requests: list[Request], log: Path
) -> tuple[list[Answer], dict[str, Any]]:
    """The answers of one arm, and what is written down of it."""
    with server(arm, model, arguments, log) as address:
        start = time.perf_counter()
        answers, held = asyncio.run(send_all(address, requests))
        seconds = time.perf_counter() - start
        left = left_in_server(address)
    lost = [
        index
        for index, (request, answer) in enumerate(zip(requests, answers, strict=True))
        if not (answer.aborted if request.abort_after else is_whole(request, answer))
    ]
    return answers, {
        "layers": arm.layers,
        "seconds": round(seconds, 1),
        "finished": sum(answer.finished for answer in answers),
        "aborted": sum(answer.aborted for answer in answers),
        "lost": lost,
        "errors": sorted({answer.error for answer in answers if answer.error}),
        "left_in_server": left,
        "output_tokens": sum(len(answer.tokens) for answer in answers),
        "memory_mib": memory(held),
    }


def is_whole(request: Request, answer: Answer) -> bool:
    return answer.finished and len(answer.tokens) == request.max_tokens


def memory(held: list[float]) -> dict[str, Any]:
    """Medians in MiB over each tenth of the answers, and how much the last one is more
    than the first after warm-up."""
    ends = [len(held) * tenth // 10 for tenth in range(11)]
    tenths = [statistics.median(held[a:b]) for a, b in itertools.pairwise(ends)]
    return {
        "by_tenth": [round(each, 1) for each in tenths],
        "growth": round(tenths[-1] - tenths[WARM_UP_TENTHS], 1),
    }


def differing(native: list[Answer], encoded: list[Answer]) -> Iterator[int]:
    """The requests whose tokens differ; aborted ones up to where the shorter ends."""
    for index, (one, other) in enumerate(zip(native, encoded, strict=True)):
        if one.aborted and other.aborted:
            same = all(a == b for a, b in zip(one.tokens, other.tokens, strict=False))
        else:
            same = one.tokens == other.tokens
        if not same:
            yield index


def compare(options: argparse.Namespace) -> dict[str, Any]:
    """What both arms did, as it is written down."""
    os.environ.update(ENVIRONMENT)
    requests = make_requests(options.requests, options.seed)
    arguments = SERVER if options.compiled else [*SERVER, "--enforce-eager"]
    result: dict[str, Any] = {
        "command": " ".join(["python -m scripts.load", *sys.argv[1:]]),
        "seed": options.seed,
        **in_new_process(survey_for, [NATIVE, ENCODED]),
        "environment": ENVIRONMENT,
        "server": arguments,
        "model": {"architecture": "LlamaForCausalLM", "head_dim": 64} | SHAPE,
        "requests": len(requests),
        "concurrency": CONCURRENCY,
        "prompt_tokens": PROMPT_TOKENS,
        "output_tokens": OUTPUT_TOKENS,
        "growth_allowed_mib": GROWTH_MIB,
        "arms": {},
    }
    answers = {}
    with tempfile.TemporaryDirectory() as folder:
        model = save(Path(folder) / "model", "LlamaForCausalLM", head_dim=64)
        for arm in (NATIVE, ENCODED):
            log = Path(folder) / f"{arm.name}.log"
            answers[arm], found = run(arm, model, arguments, requests, log)
            result["arms"][arm.name] = found
            print(arm.name, found, flush=True)
    result["different"] = list(differing(answers[NATIVE], answers[ENCODED]))
    native, encoded = (result["arms"][arm.name] for arm in (NATIVE, ENCODED))
    growth = encoded["memory_mib"]["growth"] - native["memory_mib"]["growth"]
    result["growth_beyond_native_mib"] = round(growth, 1)
    result["passed"] = (
        not result["different"]
        and not any(arm["lost"] or arm["left_in_server"] for arm in (native, encoded))
        and growth <= GROWTH_MIB
    )
    return result


def main() -> int:
    parser = Parser(prog="python -m scripts.load", description=__doc__)
    parser.add_argument("--requests", type=int, default=1000, help="(default: 1000)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--compiled", action="store_true", help="as vLLM does by default; else eager"
    )
    parser.add_argument("--out", type=Path, default=DOCS / "load.json")
    options = parser.parse_args()
    try:
        with interruptible():
            result = compare(options)
    except KeyboardInterrupt:
        print("interrupted: no record", file=sys.stderr)
        return 130
    options.out.write_text(json.dumps(result, indent=2) + "\n")
    print("different:", result["different"], "passed:", result["passed"])
    return 0 if result["passed"] else 1


if __name__ == "__main__":
    sys.exit(main())
