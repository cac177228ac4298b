"""The model as the adversary has it: the weights, run with transformers, not vLLM."""

from collections.abc import Iterator, Sequence
from functools import cached_property
from typing import Any

import torch
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.cache_utils import DynamicCache
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

FIRST_BLOCK = 64
LARGEST_BLOCK = 2048
_MEMO_BYTES = 1 << 30


class States:
    """What one layer's attention computes in the clear for each of B rows, float32."""

    def __init__(
        self, model: "LayerModel", hidden: torch.Tensor, positions: torch.Tensor
    ) -> None:
        """`hidden` (B, H) is the attention's input, after the norm."""
        self.hidden = hidden
        self._model = model
        self._positions = positions

    @cached_property
    def q(self) -> torch.Tensor:
        """Queries after RoPE (B, N, D)."""
        return self._model.rotate(self._project("q_proj"), self._positions)

    @cached_property
    def k(self) -> torch.Tensor:
        """Keys after RoPE (B, M, D)."""
        return self._model.rotate(self._project("k_proj"), self._positions)

    @cached_property
    def v(self) -> torch.Tensor:
        """Values (B, M, D)."""
        return self._project("v_proj")

    def _project(self, name: str) -> torch.Tensor:
        attention = self._model.attention
        with torch.inference_mode():
            heads = getattr(attention, name)(self.hidden)
        return heads.unflatten(-1, (-1, attention.head_dim))


class PublicModel:
    """All weights of a model without key norms, float32 on the CPU, and its tokenizer."""

    def __init__(self, model: str, wrong: torch.Generator | None = None) -> None:
        """`model` is a path or a hub name. With `wrong` each parameter's entries are
        shuffled: the same shapes and scales, and nothing that was learnt.
        """
        self.causal: Any = AutoModelForCausalLM.from_pretrained(
            model, dtype=torch.float32, attn_implementation="sdpa"
        ).eval()
        if wrong is not None:
            for parameter in self.causal.parameters():
                order = torch.randperm(parameter.numel(), generator=wrong)
                parameter.data = parameter.data.flatten()[order].view_as(parameter)
        self._path = model
        self.vocabulary = self.causal.get_input_embeddings().num_embeddings
        self._reader = _Reader(self.causal)

    @cached_property
    def tokenizer(self) -> Any:
        """The model's own."""
        return AutoTokenizer.from_pretrained(self._path)

    @torch.inference_mode()
    def read(self, ids: torch.Tensor) -> DynamicCache:
        """The KV cache, in the clear, of a text (T,)."""
        past = DynamicCache()
        self.causal(ids[None], past_key_values=past)
        return past

    @torch.inference_mode()
    def next_tokens(self, prefix: torch.Tensor) -> torch.Tensor:
        """The vocabulary from the likeliest to the least likely after `prefix` (P,).

        Without a prefix it is that after the token that begins a text.
        """
        if not len(prefix):
            prefix = torch.tensor([self.causal.config.bos_token_id])
        past = self._reader.after(prefix[:-1])
        logits = self.causal(prefix[None, -1:], past_key_values=past).logits[0, -1]
        self._reader.ids = prefix.tolist()
        return logits.argsort(descending=True)

    def layer(self, index: int) -> "LayerModel":
        """The model up to the attention of layer `index`."""
        return LayerModel(self, index)


class LayerModel:
    """What the adversary can compute for one layer's attention."""

    def __init__(self, public: PublicModel, index: int) -> None:
        self.public = public
        self.index = index
        self.vocabulary = public.vocabulary
        base = public.causal.model
        layer = base.layers[index]
        self.attention, self._rotary = layer.self_attn, base.rotary_emb
        # The same class with the layers below only, and this layer's input norm as
        # its last: its result is what this layer's attention is given.
        config = type(base.config).from_dict(
            base.config.to_dict() | {"num_hidden_layers": index}
        )
        config._attn_implementation = base.config._attn_implementation
        with torch.device("meta"):
            self._trunk = type(base)(config)
        self._trunk.embed_tokens, self._trunk.rotary_emb = (
            base.embed_tokens,
            base.rotary_emb,
        )
        self._trunk.layers = nn.ModuleList(base.layers[:index])
        self._trunk.norm = layer.input_layernorm
        self._trunk.eval()
        self._reader = _Reader(self._trunk)
        self._traces: dict[tuple[int, ...], States] = {}
        self._orders: dict[tuple[int, ...], torch.Tensor] = {}
        self._blocks: dict[tuple[tuple[int, ...], int], torch.Tensor] = {}
        self._memo_bytes = 0

    @torch.inference_mode()
    def trace(self, ids: torch.Tensor) -> States:
        """The states of a text (T,), one row per token. Kept for other attacks."""
        key = tuple(ids.tolist())
        if key not in self._traces:
            hidden = self._trunk(ids[None], use_cache=False).last_hidden_state[0]
            self._traces[key] = States(self, hidden, torch.arange(len(ids)))
        return self._traces[key]

    @cached_property
    def table(self) -> torch.Tensor:
        """The layer's input norm of every token's embedding (V, H).

        In layer 0 that is the layer's input, whatever came before.
        """
        with torch.inference_mode():
            embeddings = self._trunk.embed_tokens.weight
            return torch.cat([self._trunk.norm(part) for part in embeddings.split(8192)])

    @cached_property
    def value_table(self) -> torch.Tensor:
        """V of each row of `table` (V, M, D)."""
        return States(self, self.table, torch.zeros(1)).v

    @torch.inference_mode()
    def keys_and_values(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Weight (2M x D, H) and bias (2M x D,) of keys before RoPE, then values."""
        projections = (self.attention.k_proj, self.attention.v_proj)
        weight = torch.cat([projection.weight for projection in projections])
        bias = weight.new_zeros(len(weight))
        if projections[0].bias is not None:
            bias = torch.cat([projection.bias for projection in projections])
        return weight, bias

    @torch.inference_mode()
    def rotate(self, heads: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        """Heads (B, heads, D) turned to their positions (B,)."""
        cos, sin = self._rotary(heads, positions[None])
        turned, _ = apply_rotary_pos_emb(heads, heads, cos[0], sin[0], unsqueeze_dim=1)
        return turned

    @torch.inference_mode()
    def unrotate(self, heads: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        """Undo `rotate`."""
        cos, sin = self._rotary(heads, positions[None])
        turned, _ = apply_rotary_pos_emb(heads, heads, cos[0], -sin[0], unsqueeze_dim=1)
        return turned / (cos**2 + sin**2)[0, :, None]

    def candidates(self, prefix: Sequence[int]) -> Iterator[tuple[torch.Tensor, States]]:
        """Blocks of candidates for the token after `prefix`, the likeliest first.

        Yields token ids (B,) and their states at that position; all blocks together
        are the whole vocabulary. Blocks grow, and are remembered for the attacks
        that come this way again.
        """
        key = tuple(prefix)
        if key not in self._orders:
            self._orders[key] = self.public.next_tokens(
                torch.tensor(key, dtype=torch.int64)
            )
        order, start, size = self._orders[key], 0, FIRST_BLOCK
        while start < len(order):
            ids = order[start : start + size]
            hidden = self._hidden_after(key, start, ids)
            yield ids, States(self, hidden, torch.full((len(ids),), len(key)))
            start, size = start + size, min(2 * size, LARGEST_BLOCK)

    def _hidden_after(
        self, prefix: tuple[int, ...], start: int, ids: torch.Tensor
    ) -> torch.Tensor:
        hidden = self._blocks.get((prefix, start))
        if hidden is None:
            hidden = torch.cat([self._extend(prefix, part) for part in ids.split(512)])
            if self._memo_bytes < _MEMO_BYTES:
                self._blocks[prefix, start] = hidden
                self._memo_bytes += hidden.nbytes
        return hidden

    @torch.inference_mode()
    def _extend(self, prefix: tuple[int, ...], ids: torch.Tensor) -> torch.Tensor:
        """The layer's input (B, H) for each of `ids` (B,) as the token after `prefix`.

        All stand in one sequence at the same position, each seeing the prefix and
        itself: one pass, one copy of the prefix.
        """
        if not self.index:
            return self._trunk.norm(self._trunk.embed_tokens(ids))
        count, length = len(ids), len(prefix)
        past = self._reader.after(torch.tensor(prefix, dtype=torch.int64))
        sees = torch.cat([torch.ones(count, length), torch.eye(count)], dim=1).bool()
        mask = torch.zeros(sees.shape).masked_fill(~sees, torch.finfo(torch.float32).min)
        result = self._trunk(
            input_ids=ids[None],
            attention_mask=mask[None, None],
            position_ids=torch.full((1, count), length),
            past_key_values=past,
        )
        past.crop(-count)
        return result.last_hidden_state[0]


class _Reader:
    """Keys and values of the text read last, so that a longer one costs the rest only."""

    def __init__(self, model: Any) -> None:
        self._model = model
        self._past = DynamicCache()
        self.ids: list[int] = []

    @torch.inference_mode()
    def after(self, prefix: torch.Tensor) -> DynamicCache:
        """The cache that holds exactly `prefix` (P,)."""
        wanted = prefix.tolist()
        common = 0
        while (
            common < min(len(wanted), len(self.ids))
            and wanted[common] == self.ids[common]
        ):
            common += 1
        if common < len(self.ids):
            self._past.crop(common - len(self.ids))
        if common < len(wanted):
            self._model(prefix[None, common:], past_key_values=self._past, use_cache=True)
        self.ids = wanted
        return self._past
