"""What secure device cuda adds to a layer, on this machine's GPU.

    python -m scripts.layer_bench [--out FILE.json]

CUDA graphs of 28 layers of Qwen2-7B's shapes hold what surrounds a layer's attention: a
norm, the projection, RoPE, and the projection of the output. One copies rows in place of
the attention, so that both do. The graphs run in turn; medians, and the difference to the
native one in microseconds per layer.
"""

import json
import statistics
from pathlib import Path

import torch
from torch.nn.functional import linear
from vllm import _custom_ops as ops

from lab.cli import Parser
from lab.provenance import survey
from scx.codecs.permutation import PermutationCodec
from scx.devices.accelerator import AcceleratorSecureLayer
from scx.keys import RootKey

LAYERS, HIDDEN, HEADS, KV_HEADS, HEAD_DIM = 28, 3584, 28, 4, 128
QUERY, QKV = HEADS * HEAD_DIM, (HEADS + 2 * KV_HEADS) * HEAD_DIM
POSITIONS = 16384
CUDA = {"device": "cuda", "dtype": torch.bfloat16}


class Layer:
    """Weights of one layer, and its secure device."""

    def __init__(self, table: torch.Tensor) -> None:
        self.norm = torch.ones(HIDDEN, **CUDA)
        self.qkv = torch.randn(QKV, HIDDEN, **CUDA) / HIDDEN**0.5
        self.output = torch.randn(HIDDEN, QUERY, **CUDA) / QUERY**0.5
        codec = PermutationCodec.derive(RootKey.draw(), 0, range(KV_HEADS), HEAD_DIM)
        self.secure = AcceleratorSecureLayer(codec, table, True, HEADS)
        self.table = table

    def native(self, rows: torch.Tensor, positions: torch.Tensor) -> None:
        qkv = linear(self.normed(rows), self.qkv)
        q, k, _ = qkv.split([QUERY, KV_HEADS * HEAD_DIM, KV_HEADS * HEAD_DIM], dim=-1)
        ops.rotary_embedding(positions, q, k, HEAD_DIM, self.table, True)
        linear(attend(q), self.output)

    def encoded(self, rows: torch.Tensor, positions: torch.Tensor) -> None:
        qkv = linear(self.secure.encode_rows(self.normed(rows)), self.qkv)
        q, _, _ = self.secure.encode_features(qkv, positions)
        output = torch.empty(len(rows), QUERY, **CUDA)
        self.secure.decode_features(attend(q), output)
        linear(output, self.output)

    def normed(self, rows: torch.Tensor) -> torch.Tensor:
        result = torch.empty_like(rows)
        ops.rms_norm(result, rows, self.norm, 1e-6)
        return result


def attend(queries: torch.Tensor) -> torch.Tensor:
    """In place of the attention: its result is contiguous."""
    return queries.clone(memory_format=torch.contiguous_format)


def graph_of(layers: list[Layer], method: str, tokens: int) -> torch.cuda.CUDAGraph:
    rows = torch.randn(tokens, HIDDEN, **CUDA)
    positions = torch.arange(tokens, device="cuda")

    def step() -> None:
        for layer in layers:
            getattr(layer, method)(rows, positions)

    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        step()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    return graph


def microseconds(graph: torch.cuda.CUDAGraph) -> float:
    """Of one layer, in one replay."""
    start, end = (torch.cuda.Event(enable_timing=True) for _ in "ab")
    start.record()
    graph.replay()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) * 1e3 / LAYERS


def main() -> None:
    parser = Parser(description=__doc__)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    table = torch.randn(POSITIONS, HEAD_DIM, **CUDA)
    layers = [Layer(table) for _ in range(LAYERS)]
    results: dict = survey() | {"microseconds_per_layer": {}}
    for tokens in (1, 8, 64, 256, 1024, 4096, 16384):
        graphs = {name: graph_of(layers, name, tokens) for name in ("native", "encoded")}
        taken: dict[str, list[float]] = {name: [] for name in graphs}
        for _ in range(30 if tokens <= 1024 else 9):
            for name, graph in graphs.items():
                taken[name].append(microseconds(graph))
        row = {name: statistics.median(times) for name, times in taken.items()}
        row["added"] = row["encoded"] - row["native"]
        results["microseconds_per_layer"][tokens] = row
        print(tokens, {name: round(value, 2) for name, value in row.items()}, flush=True)
    if options.out is not None:
        options.out.write_text(json.dumps(results, indent=2) + "\n")


if __name__ == "__main__":
    main()
