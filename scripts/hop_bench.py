"""What one trip to the host costs, alone, on this machine's GPU.

    python -m scripts.hop_bench [--out FILE.json] [--workers N]

For the shapes of Qwen2-1.5B: the mean of a step's three trips, in a CUDA graph of 20
steps, where steps are small; each trip of its own where they are long. Beside them
plain pinned copies of the same bytes in both directions, one after the other and at
once. Medians of 9.
"""

import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch

from lab.cli import Parser
from scx.codecs.permutation import PermutationCodec
from scx.devices.cores import usable_cores, workers_for
from scx.devices.host import HostDevice, HostSecureLayer
from scx.devices.interface import Rank
from scx.keys import RootKey

HIDDEN, HEADS, KV_HEADS, HEAD_DIM = 1536, 12, 2, 128
REPEATS = 9
STEPS = 20


def timed(run: Callable[[], None], trips: int) -> float:
    """Median microseconds a trip."""
    seconds = []
    for _ in range(REPEATS):
        torch.cuda.synchronize()
        start = time.perf_counter()
        run()
        torch.cuda.synchronize()
        seconds.append(time.perf_counter() - start)
    return statistics.median(seconds) / trips * 1e6


def trips(layer: HostSecureLayer, tokens: int) -> dict[str, Callable[[], None]]:
    """The three trips of a layer for a step of so many tokens."""
    width = (HEADS + 2 * KV_HEADS) * HEAD_DIM
    cuda = {"device": "cuda", "dtype": torch.bfloat16}
    hidden, qkv = torch.randn(tokens, HIDDEN, **cuda), torch.randn(tokens, width, **cuda)
    attention = torch.randn(tokens, HEADS * HEAD_DIM, **cuda)
    output = torch.empty_like(attention)
    positions = torch.arange(tokens, device="cuda")
    return {
        "encode_rows": lambda: layer.encode_rows(hidden),
        "encode_features": lambda: layer.encode_features(qkv, positions),
        "decode_features": lambda: layer.decode_features(attention, output),
    }


def small(step: dict[str, Callable[[], None]]) -> dict[str, float]:
    """Microseconds per trip, over graphs of many steps; a warm-up ran before."""
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for trip in [*step.values()] * STEPS:
            trip()
    return {"trip": timed(graph.replay, STEPS * len(step))}


def long(step: dict[str, Callable[[], None]]) -> dict[str, float]:
    """Microseconds of each trip, from its start on the device to its end."""
    taken: dict[str, list[float]] = {name: [] for name in step}
    for _ in range(REPEATS):
        # About a millisecond, in which the host draws its next words, as it does in a
        # model while other layers run.
        torch.cuda._sleep(2_000_000)
        events = [torch.cuda.Event(enable_timing=True) for _ in range(len(step) + 1)]
        events[0].record()
        for trip, event in zip(step.values(), events[1:], strict=True):
            trip()
            event.record()
        torch.cuda.synchronize()
        for name, start, end in zip(step, events[:-1], events[1:], strict=True):
            taken[name].append(start.elapsed_time(end) * 1e3)
    return {name: statistics.median(times) for name, times in taken.items()}


def copies(tokens: int, width: int) -> dict[str, float]:
    """Microseconds of pinned copies of (tokens, width) bfloat16."""
    host = [
        torch.empty(tokens, width, dtype=torch.bfloat16, pin_memory=True) for _ in "ab"
    ]
    device = [
        torch.empty(tokens, width, dtype=torch.bfloat16, device="cuda") for _ in "ab"
    ]
    other = torch.cuda.Stream()

    def down() -> None:
        host[0].copy_(device[0], non_blocking=True)

    def up() -> None:
        device[1].copy_(host[1], non_blocking=True)

    def both() -> None:
        with torch.cuda.stream(other):
            up()
        down()

    def one_after_other() -> None:
        down()
        up()

    return {run.__name__: timed(run, 1) for run in (down, up, one_after_other, both)}


def main() -> None:
    parser = Parser(description=__doc__)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--workers", type=int, help="default: what an engine would take")
    options = parser.parse_args()
    workers = options.workers or workers_for(usable_cores(), 1)
    host = HostDevice(
        [PermutationCodec.derive(RootKey.draw(), 0, range(KV_HEADS), HEAD_DIM)],
        [torch.randn(40_000, HEAD_DIM)],
        Rank(
            num_heads=HEADS,
            hidden_size=HIDDEN,
            dtype=torch.bfloat16,
            max_tokens=16384,
            is_neox_style=True,
            accelerator=torch.device("cuda"),
            secure_device=torch.device("cpu"),
            workers=workers,
        ),
    )
    layer = HostSecureLayer(host, 0)
    results: dict = {
        "device": torch.cuda.get_device_name(),
        "workers": workers,
        "pinned_bytes": host.mailbox.nbytes,
        "microseconds": {},
        "copies": {t: copies(t, 2048) for t in (1, 64, 8192, 16384)},
    }
    for tokens in (1, 8, 64, 256, 1024, 8192, 16384):
        row = results["microseconds"][tokens] = {}
        step = trips(layer, tokens)
        for trip in step.values():
            trip()
        row |= small(step) if tokens <= 256 else long(step)
        print(tokens, {name: round(value, 1) for name, value in row.items()}, flush=True)
    print(
        {t: {k: round(v, 1) for k, v in r.items()} for t, r in results["copies"].items()}
    )
    if options.out is not None:
        options.out.write_text(json.dumps(results, indent=2) + "\n")
    host.close()


if __name__ == "__main__":
    main()
