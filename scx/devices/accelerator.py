"""The accelerator itself as secure device, as in a GPU with confidential computing.

Nothing leaves the accelerator and nothing waits for the host: the steps are the
kernels of `scx.kernels.cuda.secure`, which any CUDA graph can hold.
"""

import os

import torch

from scx.codecs.interface import FeatureCodec
from scx.codecs.permutation import PermutationCodec
from scx.devices.plain import SecureLayer, Traffic
from scx.kernels.cuda import secure as kernels


class AcceleratorSecureLayer(SecureLayer):
    """The secure part of one encoded layer where both devices are one.

    Its calls are those of SecureLayer; their results are contiguous. Row orders
    come from ChaCha20 under a key of the operating system's that is the layer's
    own and that it never lets go.
    """

    def __init__(
        self,
        device: torch.device,
        features: FeatureCodec,
        cos_sin_cache: torch.Tensor,
        is_neox_style: bool,
        num_heads: int,
    ) -> None:
        super().__init__(device, features, cos_sin_cache, is_neox_style, num_heads)
        self._num_heads = num_heads
        self._permutes = isinstance(self.features, PermutationCodec)
        if self._permutes:
            self._key, self._inverse_key = self.features.tables
        else:
            # Other features are mapped afterwards, by torch operations that a graph
            # holds as well.
            stay = torch.arange(features.head_dim, device=device)
            self._key = stay.repeat(features.kv_heads, 1)
        random_bytes = bytearray(os.urandom(32))
        self._row_key = torch.frombuffer(random_bytes, dtype=torch.int32).to(device)
        # Steps and tokens so far. Graphs are replayed without Python, so the device
        # counts; the steps are the nonces of the row orders.
        self._counters = torch.zeros(2, dtype=torch.int64, device=device)
        self._row_bytes = 0

    def encode_rows(self, hidden_states: torch.Tensor) -> torch.Tensor:
        words = kernels.draw_words(self._row_key, self._counters, len(hidden_states))
        hidden_states = hidden_states.contiguous()
        rows, self._pi = kernels.encode_rows(hidden_states, words, self._counters)
        self._row_bytes = (
            hidden_states.shape[1] + sum(self._split) + self._split[0]
        ) * hidden_states.itemsize
        return rows

    def encode_features(
        self, qkv: torch.Tensor, positions: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        encoded = kernels.encode_features(
            qkv.contiguous(),
            self._take_order(),
            positions,
            self._cos_sin_cache,
            self._key,
            self._num_heads,
            self._is_neox_style,
        )
        q, k, v = encoded.split(self._split, dim=-1)
        if self._permutes:
            return q, k, v
        encode = self.features
        return encode.encode_queries(q), encode.encode_keys(k), encode.encode_values(v)

    def decode_features(self, attention: torch.Tensor, output: torch.Tensor) -> None:
        if self._permutes:
            kernels.decode_features(attention.contiguous(), self._inverse_key, output)
        else:
            output.copy_(self.features.decode_output(attention))

    @property
    def traffic(self) -> Traffic:
        """What was handed from one side to the other, replayed graphs included."""
        steps, tokens = self._counters.tolist()
        size = tokens * self._row_bytes
        return Traffic(steps, 6 * steps, size + tokens * torch.int64.itemsize, size)
