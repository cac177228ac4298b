"""What rounding to 16 bits costs the affine codec, by the size of a feature of K.

    python -m scripts.affine_numerics > docs/affine-numerics.json

Some models have key biases far larger than the rest of K, in features that queries
look away from. The codec spreads such a feature over the whole head, and its rounding
with it. Measured: the L1 distance of the weights of attention, which sum to one, from
those of the same heads in float64; mean over queries, worst of the keys.
"""

import json
import sys
from functools import cache
from importlib.metadata import version

import torch

from scx.codecs.affine import AffineCodec
from scx.keys import RootKey

SEED = 0
KEYS = 4
TOKENS, HEADS = 256, 2
FEATURES = (0, 10, 20, 50, 100, 200, 400)


@cache
def codecs(head_dim: int) -> list[AffineCodec]:
    """The same ones each time."""
    roots = [RootKey(bytes([i]) * 32) for i in range(KEYS)]
    return [AffineCodec.derive(root, 0, range(HEADS), head_dim) for root in roots]


def weights(q: torch.Tensor, k: torch.Tensor, head_dim: int) -> torch.Tensor:
    """Of attention (heads, T, T), float64, from (T, heads x D)."""
    q, k = (x.double().unflatten(-1, (HEADS, head_dim)).transpose(0, 1) for x in (q, k))
    return (q @ k.mT / head_dim**0.5).softmax(-1)


def errors(dtype: torch.dtype, head_dim: int, feature: float) -> dict[str, float]:
    """Of the plain heads, of the affine ones, and of plain ones with K in FP8 (E4M3)."""
    generator = torch.Generator().manual_seed(SEED)
    q, k = torch.randn(2, TOKENS, HEADS, head_dim, generator=generator)
    # A pair that RoPE turns, as a bias of the slowest pairs stays where it is.
    for i, sign in ((7, 1), (7 + head_dim // 2, -1)):
        k[..., i] += sign * feature
        q[..., i] *= 0.1
    q, k = q.flatten(1), k.flatten(1)
    exact = weights(q, k, head_dim)

    def error(q: torch.Tensor, k: torch.Tensor) -> float:
        off = weights(q, k, head_dim) - exact
        return off.abs().sum(-1).mean().item()

    q, k = q.to(dtype), k.to(dtype)
    affine = max(
        error(codec.encode_queries(q), codec.encode_keys(k)) for codec in codecs(head_dim)
    )
    eight_bits = k.to(torch.float8_e4m3fn).to(dtype)
    return {"native": error(q, k), "affine": affine, "fp8_cache": error(q, eight_bits)}


def main() -> None:
    """Print the record."""
    found = [
        {
            "dtype": str(dtype).removeprefix("torch."),
            "head_dim": head_dim,
            "feature": feature,
            **{name: float(f"{x:.3g}") for name, x in measured.items()},
            "ratio": round(measured["affine"] / measured["native"], 1),
        }
        for dtype in (torch.bfloat16, torch.float16)
        for head_dim in (64, 128)
        for feature in FEATURES
        for measured in (errors(dtype, head_dim, feature),)
    ]
    record = {
        "seed": SEED,
        "keys": KEYS,
        "tokens": TOKENS,
        "heads": HEADS,
        "versions": {name: version(name) for name in ("scx-vllm", "torch")},
        "weights_of_attention": found,
    }
    json.dump(record, sys.stdout, indent=1)
    print()


if __name__ == "__main__":
    main()
