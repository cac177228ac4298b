"""A codec with a secret map and a secret offset of each head's features.

For an invertible map A of a key/value head and offsets a and b of its keys and
values: q becomes qA, k becomes (k + a) A^-T, v becomes (v + b) B. Then a score is
q(k + a)^T = qk^T + qa^T, the same constant more for all keys of a query, which
softmax does not see; and the weights sum to one, so the output is (o + b) B, which
B^-1 and b undo. Attention and its cache are the stock ones.

Unlike a permutation it mixes features, so their values do not survive in a cache. Any
fixed map still falls to least squares over vectors that are known with their encoding:
a handful of known tokens, or one step at the border. `python -m scx audit --codec
affine` measures both.
"""

import math
from collections.abc import Sequence

import torch
from typing_extensions import Self

from scx.codecs.interface import FeatureCodec
from scx.keys import RootKey

CONDITION = 4.0
"""The maps' condition number, which bounds how much rounding errors can grow."""
OFFSET = 0.25
"""The offsets' standard deviation: large enough that a head near zero moves
away from it, small beside most keys and values, as rounding grows with it."""


class AffineCodec(FeatureCodec):
    """`A`, `B` and the offsets of one layer, in float32.

    Calculated in float32 at least and rounded once in each direction. If the
    heads are bfloat16 or float16, errors of that rounding can be up to CONDITION
    times those of the heads themselves, if no feature is far larger than the rest:
    its rounding is spread over the whole head (docs/affine-numerics.json). Heads of
    float16 whose norm is below 32,752 stay finite.
    """

    name = "affine"
    moves_only = False
    shifts_scores = True
    host_kernels = "affine"
    largest_key_bias = 20.0

    def __init__(
        self, key_maps: torch.Tensor, value_maps: torch.Tensor, offsets: torch.Tensor
    ) -> None:
        """All float64: A and its inverse (2, M, D, D), the same of B, and the offsets
        (2, M, D) of keys and of values."""
        self.kv_heads, self.head_dim = offsets.shape[1:]
        self._key_maps, self._value_maps, self._offsets = key_maps, value_maps, offsets
        of_queries, inverse_a = key_maps
        of_values, inverse_b = value_maps
        of_keys = inverse_a.transpose(-1, -2)
        a, b = offsets[:, :, None]

        def single(matrix: torch.Tensor, row: torch.Tensor) -> tuple[torch.Tensor, ...]:
            return matrix.float(), row.squeeze(-2).float()

        none = torch.zeros_like(a)
        self._queries = single(of_queries, none)
        self._keys = single(of_keys, a @ of_keys)
        self._values = single(of_values, b @ of_values)
        self._keys_back = single(of_queries.transpose(-1, -2), -a)
        self._values_back = single(inverse_b, -b)

    @classmethod
    def derive(
        cls, root: RootKey, layer: int, kv_heads: Sequence[int], head_dim: int
    ) -> Self:
        def normal(name: str, *shape: int) -> torch.Tensor:
            return torch.stack(
                [_normal(root, ("affine", name, layer, head), shape) for head in kv_heads]
            )

        square = (head_dim, head_dim)
        key_maps, value_maps = (
            _well_conditioned(normal(f"{name} left", *square), normal(name, *square))
            for name in ("keys", "values")
        )
        offsets = [normal(f"{name} offset", head_dim) for name in ("keys", "values")]
        return cls(key_maps, value_maps, OFFSET * torch.stack(offsets))

    def to(self, device: torch.device) -> Self:
        if device == self._key_maps.device:
            return self
        parts = (self._key_maps, self._value_maps, self._offsets)
        return type(self)(*(part.to(device) for part in parts))

    def encode_queries(self, heads: torch.Tensor) -> torch.Tensor:
        return _apply(heads, *self._queries)

    def encode_keys(self, heads: torch.Tensor) -> torch.Tensor:
        return _apply(heads, *self._keys)

    def encode_values(self, heads: torch.Tensor) -> torch.Tensor:
        return _apply(heads, *self._values)

    def decode_output(self, heads: torch.Tensor) -> torch.Tensor:
        return _apply(heads, *self._values_back)

    decode_values = decode_output

    def decode_keys(self, heads: torch.Tensor) -> torch.Tensor:
        return _apply(heads, *self._keys_back)

    @property
    def tables(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Maps, each with its row below, of queries, keys and values, float32
        (3M, D + 1, D), and of the output, float32 (M, D + 1, D)."""
        encoding = [
            torch.cat([maps, row[:, None]], dim=1)
            for maps, row in (self._queries, self._keys, self._values)
        ]
        maps, row = self._values_back
        return torch.cat(encoding), torch.cat([maps, row[:, None]], dim=1)


def _apply(heads: torch.Tensor, maps: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
    """Each head times its key/value head's map, plus that head's row."""
    kv_heads, head_dim = rows.shape
    wide = torch.promote_types(heads.dtype, torch.float32)
    columns = heads.shape[-1] // kv_heads
    groups = heads.reshape(-1, kv_heads, columns).to(wide).transpose(0, 1)
    # All vectors of a map in one product: broadcast, each token would get its own copy.
    vectors = groups.reshape(kv_heads, -1, head_dim)
    mapped = torch.baddbmm(rows[:, None].to(wide), vectors, maps.to(wide))
    rows_again = mapped.reshape(groups.shape).transpose(0, 1)
    return rows_again.reshape(heads.shape).to(heads.dtype)


def _well_conditioned(left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
    """Maps with singular values from 1 / sqrt(CONDITION) to sqrt(CONDITION), and their
    inverses: (2, M, D, D).

    Between two random rotations or reflections, uniform ones if `left` and
    `right` (M, D, D) are normal: F. Mezzadri, How to generate random matrices from
    the classical compact groups, 2007. So inverses are products too; torch's own, of
    several matrices at once on a CPU, can be wrong (pytorch/pytorch issue 142815).
    """
    bound = 0.5 * math.log2(CONDITION)
    kind = {"dtype": left.dtype, "device": left.device}
    stretch = torch.linspace(-bound, bound, left.shape[-1], **kind).exp2()
    first, second = _uniform_rotation(left), _uniform_rotation(right)
    back = second.transpose(-1, -2) / stretch @ first.transpose(-1, -2)
    return torch.stack([first * stretch @ second, back])


def _uniform_rotation(normal: torch.Tensor) -> torch.Tensor:
    q, r = torch.linalg.qr(normal)
    return q * r.diagonal(dim1=-2, dim2=-1).sign()[..., None, :]


def _normal(
    root: RootKey, fields: tuple[str | int, ...], shape: tuple[int, ...]
) -> torch.Tensor:
    """Normal numbers, float64, that belong to some fields: 52 random bits each."""
    stream = root.stream(*fields, length=8 * math.prod(shape))
    words = torch.frombuffer(bytearray(stream), dtype=torch.int64)
    # Half a step from 0 and from 1: a double's 53 bits hold 52 random ones and the half.
    uniform = ((words >> 12).double() + (2.0**51 + 0.5)) / 2.0**52
    return torch.special.ndtri(uniform).reshape(shape)
