"""What one trip to the host costs, alone, on this machine's GPU.

    python -m scripts.hop_bench [--shape NAME] [--out FILE.json] [--workers N]

The mean of a step's trips, in a CUDA graph of 20 steps, where steps are small; each trip
of its own where they are long. Beside them plain pinned copies of the same rows in both
directions, one after the other and at once. Medians of 9.
"""

import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch

from lab.cli import Parser
from lab.provenance import survey
from scx.codecs.permutation import PermutationCodec
from scx.commands.estimate import Shape
from scx.devices.host import HostDevice, HostSecureLayer
from scx.devices.interface import Rank
from scx.kernels.host.cores import usable_cores, workers_for
from scx.keys import RootKey

SHAPES = {
    "qwen2-1.5b": Shape(28, 1536, 12, 2, 128),
    "qwen2-7b": Shape(28, 3584, 28, 4, 128),
}
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


def trips(
    layer: HostSecureLayer, shape: Shape, tokens: int
) -> dict[str, Callable[[], None]]:
    """The trips of a layer for a step of so many tokens."""
    cuda = {"device": "cuda", "dtype": torch.bfloat16}
    hidden = torch.randn(tokens, shape.hidden_size, **cuda)
    qkv = torch.randn(tokens, shape.qkv_size, **cuda)
    attention = torch.randn(tokens, shape.query_size, **cuda)
    output = torch.empty_like(attention)
    positions = torch.arange(tokens, device="cuda")
    calls = {
        "encode_rows": lambda: layer.encode_rows(hidden),
        "encode_features": lambda: layer.encode_features(qkv, positions),
        "decode_features": lambda: layer.decode_features(attention, output),
    }
    if tokens == 1:
        # The host is not asked for the order of a single row.
        del calls["encode_rows"]
    return calls


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
    parser.add_argument("--shape", choices=SHAPES, default="qwen2-1.5b")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--workers", type=int, help="default: what an engine would take")
    options = parser.parse_args()
    shape = SHAPES[options.shape]
    workers = options.workers or workers_for(usable_cores(), 1)
    host = HostDevice(
        [
            PermutationCodec.derive(
                RootKey.draw(), 0, range(shape.num_kv_heads), shape.head_dim
            )
        ],
        [torch.randn(40_000, shape.head_dim)],
        Rank(
            num_heads=shape.num_heads,
            hidden_size=shape.hidden_size,
            dtype=torch.bfloat16,
            max_tokens=16384,
            is_neox_style=True,
            accelerator=torch.device("cuda"),
            secure_device=torch.device("cpu"),
            workers=workers,
        ),
    )
    layer = HostSecureLayer(host, 0)
    widths = (shape.hidden_size, shape.qkv_size, shape.query_size)
    results: dict = {
        **survey(),
        "shape": options.shape,
        "workers": workers,
        "pinned_bytes": host.mailbox.nbytes,
        "microseconds": {},
        "copies": {
            t: {f"x {width}": copies(t, width) for width in sorted(set(widths))}
            for t in (1, 64, 8192, 16384)
        },
    }
    for tokens in (1, 8, 64, 256, 1024, 8192, 16384):
        row = results["microseconds"][tokens] = {}
        step = trips(layer, shape, tokens)
        for trip in step.values():
            trip()
        row |= small(step) if tokens <= 256 else long(step)
        print(tokens, {name: round(value, 1) for name, value in row.items()}, flush=True)
    print(json.dumps(results["copies"], indent=1))
    if options.out is not None:
        options.out.write_text(json.dumps(results, indent=2) + "\n")
    host.close()


if __name__ == "__main__":
    main()
