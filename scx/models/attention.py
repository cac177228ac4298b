"""The encoded attention layer: one opaque operator that torch.compile cannot look into.

Inside it the order is: encode rows, qkv_proj on the accelerator, decode rows,
RoPE and encode features, attention on the accelerator, decode features. The
operator finds its layer by name in vLLM's forward context, as vLLM's own
attention does (vllm/model_executor/layers/attention/attention.py), so nothing
secret is in the traced graph. It writes its result in place and returns
nothing, which vLLM's graph splitting and CUDA graphs ask for.
"""

import time
from typing import Any

import torch
from torch import library, nn
from vllm.forward_context import get_forward_context
from vllm.logger import init_logger

from scx.devices.interface import HeadNorm, SecureLayer

OP_NAME = "scx::encoded_attention"

# Under vLLM's root logger, so that its handlers and levels apply.
logger = init_logger("vllm.scx")

_operators = library.Library("scx", "FRAGMENT")
_operators.define(
    "encoded_attention(Tensor positions, Tensor hidden_states, Tensor(a!) output, "
    "str layer_name) -> ()",
    tags=(torch.Tag.cudagraph_unsafe,),
)


def _encoded_attention(
    positions: torch.Tensor,
    hidden_states: torch.Tensor,
    output: torch.Tensor,
    layer_name: str,
) -> None:
    layer = get_forward_context().no_compile_layers[layer_name]
    layer.forward_encoded(positions, hidden_states, output)


_operators.impl("encoded_attention", _encoded_attention, "CompositeExplicitAutograd")
_operators.impl("encoded_attention", lambda *_: None, "Meta")


def _is_captured(tensor: torch.Tensor) -> bool:
    """Whether a CUDA graph is being captured; the log's counters cannot be read then."""
    return tensor.is_cuda and torch.cuda.is_current_stream_capturing()


class SCXAttention(nn.Module):
    """The forward pass that an encoded layer has in place of its stock one.

    A subclass names the stock attention as its second base. An instance is not
    constructed but converted in place (SCXForCausalLM), after the stock constructor ran,
    so that parameters, weight names and quantisation are the stock ones.
    """

    layer_name: str
    layer_index: int
    secure: SecureLayer
    key_fingerprint: str
    debug: bool
    calls: int = 0

    # The stock attention's, of the same shapes in Qwen2Attention and LlamaAttention.
    qkv_proj: nn.Module
    o_proj: nn.Module
    rotary_emb: Any
    attn: Any
    num_heads: int
    num_kv_heads: int
    total_num_kv_heads: int
    head_dim: int
    q_size: int
    kv_size: int
    hidden_size: int

    @property
    def head_norms(self) -> tuple[HeadNorm, ...]:
        """The norms of queries and of keys, if the stock attention has them."""
        return ()

    def forward(
        self, positions: torch.Tensor, hidden_states: torch.Tensor
    ) -> torch.Tensor:
        """Attention of `hidden_states` (T, H) at `positions` (T,): (T, H)."""
        output = hidden_states.new_empty((hidden_states.shape[0], self.q_size))
        torch.ops.scx.encoded_attention(positions, hidden_states, output, self.layer_name)
        return self.o_proj(output)[0]

    def forward_encoded(
        self,
        positions: torch.Tensor,
        hidden_states: torch.Tensor,
        output: torch.Tensor,
    ) -> None:
        """Write the attention's result before o_proj to `output` (T, N x D).

        `hidden_states` is (T, H), `positions` int64 (T,); `output` is contiguous. All are
        on the accelerator.
        """
        start = time.perf_counter()
        self.calls += 1
        rows = self.secure.encode_rows(hidden_states)
        qkv, _ = self.qkv_proj(rows)
        q, k, v = self.secure.encode_features(qkv, positions)
        self.secure.decode_features(self.attn(q, k, v), output)
        if self.debug and not _is_captured(hidden_states):
            self._log_step(hidden_states, time.perf_counter() - start)

    def _log_step(self, hidden_states: torch.Tensor, seconds: float) -> None:
        traffic = self.secure.traffic
        logger.info(
            "SCX layer %d: %s on %s, secure device %s, hidden_states %s, "
            "%d query and %d KV heads of %d; step %d, so far %d crossings, "
            "%d bytes in, %d bytes out; this step %.3f ms; key %s",
            self.layer_index,
            hidden_states.dtype,
            hidden_states.device,
            self.secure.device,
            tuple(hidden_states.shape),
            self.num_heads,
            self.num_kv_heads,
            self.head_dim,
            traffic.steps,
            traffic.crossings,
            traffic.bytes_in,
            traffic.bytes_out,
            seconds * 1e3,
            self.key_fingerprint,
        )
