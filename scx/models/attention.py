"""The encoded attention layer: one opaque operator that torch.compile cannot look into.

Inside it the order is: encode rows, qkv_proj and the norms of queries and keys on the
accelerator, decode rows, RoPE and encode features, attention on the accelerator, decode
features. A norm looks at one row alone, and the accelerator holds those rows anyway. The
operator finds its layer by name in vLLM's forward context, as vLLM's own
attention does (vllm/model_executor/layers/attention/attention.py), so nothing
secret is in the traced graph. It writes its result in place and returns
nothing, which vLLM's graph splitting and CUDA graphs ask for.
"""

import time
from typing import Any

import torch
from torch import library, nn
from vllm import ir
from vllm.forward_context import get_forward_context
from vllm.logger import init_logger

from scx.devices.interface import SecureLayer

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

    # The stock attention's, of the same meaning in all of them.
    qkv_proj: Any
    o_proj: nn.Module
    rotary_emb: Any
    """Where `turns`."""
    attn: Any
    """vLLM's Attention."""
    q_size: int
    """N x D"""
    kv_size: int
    """M x D"""

    @property
    def norms(self) -> tuple[nn.Module, ...]:
        """The norms of queries and of keys before RoPE; empty without them."""
        return ()

    @property
    def turns(self) -> bool:
        """Whether RoPE turns queries and keys in this layer."""
        return True

    def norm(self, q: torch.Tensor, k: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Queries (T, N x D) and keys (T, M x D) as `norms` make them, each head alone.

        Rows are in no order, and each must be normed without a look at another.
        """
        q_norm, k_norm = self.norms
        head_size = self.attn.head_size
        return (
            q_norm(q.unflatten(-1, (-1, head_size))).flatten(-2),
            k_norm(k.unflatten(-1, (-1, head_size))).flatten(-2),
        )

    def project(self, rows: torch.Tensor) -> torch.Tensor:
        """Queries, keys and values before RoPE, (T, (N + 2M) x D), of `rows` (T, H)."""
        qkv, _ = self.qkv_proj(rows)
        if not self.norms:
            return qkv
        q, k, v = qkv.split([self.q_size, self.kv_size, self.kv_size], dim=-1)
        # vLLM leaves norms to Inductor, which does not look into this operator. Where
        # vLLM has a kernel of its own, that one launch serves instead of half a dozen.
        with ir.ops.rms_norm.set_priority(["vllm_c", "native"]):
            return torch.cat((*self.norm(q, k), v), dim=-1)

    def forward(
        self, positions: torch.Tensor, hidden_states: torch.Tensor, **_: Any
    ) -> torch.Tensor:
        """Attention of `hidden_states` (T, H) at `positions` (T,): (T, H).

        Some models pass on what their stock attention ignores, and so does this one.
        """
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
        q, k, v = self.secure.encode_features(self.project(rows), positions)
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
            self.attn.num_heads,
            self.attn.num_kv_heads,
            self.attn.head_size,
            traffic.steps,
            traffic.crossings,
            traffic.bytes_in,
            traffic.bytes_out,
            seconds * 1e3,
            self.key_fingerprint,
        )


class SCXNormedAttention(SCXAttention):
    """The same where the stock attention always norms queries and keys."""

    q_norm: Any
    k_norm: Any

    @property
    def norms(self) -> tuple[nn.Module, ...]:
        return self.q_norm, self.k_norm
