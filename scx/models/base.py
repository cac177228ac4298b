"""What every encoded model class does beyond its stock class."""

from collections.abc import Iterable
from typing import Any

import torch
from torch import nn
from vllm import envs
from vllm.config import VllmConfig
from vllm.distributed import (
    get_tensor_model_parallel_rank,
    get_tensor_model_parallel_world_size,
)

from scx import devices
from scx.devices.interface import Rank
from scx.errors import SCXNotEncodedError, SCXUnsupportedError
from scx.keys import ENC_LAYERS, RootKey
from scx.models.attention import OP_NAME, SCXAttention, logger
from scx.plugin import kv_store, refusals
from scx.plugin.architectures import EncodedModel
from scx.plugin.plan import EncodingPlan
from scx.plugin.rotary import tables_of


class SCXForCausalLM(EncodedModel, nn.Module):
    """Mixed in before a stock class: encodes the layers that the engine recorded.

    The stock constructor builds the model; then the attention of each chosen
    layer is converted in place. Nothing of the other layers is touched.
    """

    attention_class: type[SCXAttention]
    """The encoded attention, whose second base is the stock one."""

    model: Any

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = "") -> None:
        super().__init__(vllm_config=vllm_config, prefix=prefix)
        plan, here = EncodingPlan.read(vllm_config), self._layers_here()
        chosen = [i for i in plan.layers if i in here] if plan else []
        self.plan = plan
        self.encoded = [self._attention(i) for i in chosen]
        if plan is None or not chosen:
            return
        root = plan.root_key()
        kv_store.claim(vllm_config, root.fingerprint, plan.record)
        for index, attention in zip(chosen, self.encoded, strict=True):
            found, attention.__class__ = type(attention), self.attention_class
            _require_stock(found, attention)
            refusals.require_attention(attention.attn, plan)
            attention.layer_index = index
            attention.layer_name = attention.attn.layer_name.removesuffix(".attn")
            attention.debug = plan.config.enable_debug
            attention.key_fingerprint = root.fingerprint
            _announce(attention, vllm_config)
        _attach_secure_layers(self.encoded, plan, root)
        logger.info(
            "SCX encodes the attention of layers %s of %s: %s codec, secure device %s, "
            "graph mode %s, key %s",
            ",".join(map(str, chosen)),
            type(self).__name__,
            plan.codec.name,
            plan.config.secure_device,
            getattr(vllm_config.compilation_config.cudagraph_mode, "name", "NONE"),
            root.fingerprint,
        )

    def encodes(self, layers: list[int]) -> bool:
        return all(
            isinstance(self._attention(i), SCXAttention)
            for i in layers
            if i in self._layers_here()
        )

    def _layers_here(self) -> range:
        """The layers of this pipeline rank."""
        return range(self.model.start_layer, self.model.end_layer)

    def _attention(self, index: int) -> Any:
        """The attention of a layer that is here."""
        return self.model.layers[index].self_attn

    def forward(
        self,
        input_ids: torch.Tensor | None,
        positions: torch.Tensor,
        intermediate_tensors: Any = None,
        inputs_embeds: torch.Tensor | None = None,
        **kwargs: Any,
    ) -> Any:
        """As the stock class.

        Raises SCXNotEncodedError if an encoded layer did not run encoded,
        as with a stale compiled graph. vLLM's profiling run comes through here,
        so that happens before the first request.
        """
        calls = [attention.calls for attention in self.encoded]
        result = super().forward(
            input_ids, positions, intermediate_tensors, inputs_embeds, **kwargs
        )
        for attention, before in zip(self.encoded, calls, strict=True):
            if attention.calls == before:
                raise SCXNotEncodedError(
                    f"layer {attention.layer_index} ran without its secure device: a "
                    "stale compiled graph was loaded; set VLLM_DISABLE_COMPILE_CACHE=1"
                )
        return result

    def load_weights(self, weights: Iterable[tuple[str, torch.Tensor]]) -> set[str]:
        """As the stock class. Warns if key biases cost the codec accuracy.

        An update may bring only some of the weights; vLLM then keeps a layer on the meta
        device until it has all of its own.
        """
        stock: Any = super()
        loaded = stock.load_weights(weights)
        if self.plan is None:
            return loaded
        codec = self.plan.codec
        for attention in self.encoded:
            bias = attention.qkv_proj.bias
            if bias is None or bias.is_meta or bias.dtype == torch.float32:
                continue
            # A norm makes keys of its own size, whatever the bias.
            if attention.norms:
                continue
            keys = bias[attention.q_size : attention.q_size + attention.kv_size]
            if (largest := keys.abs().max().item()) > codec.largest_key_bias:
                logger.warning_once(
                    "SCX layer %d: a key bias of %.0f, above %.0f, so %s rounds worse in "
                    "%s than the model itself: use float32, or SCX_CODEC=permutation",
                    attention.layer_index,
                    largest,
                    codec.largest_key_bias,
                    codec.name,
                    str(bias.dtype).removeprefix("torch."),
                )
        return loaded


def _require_stock(found: type, attention: SCXAttention) -> None:
    """Refuse an attention layer that is not the one that is encoded: it would be another
    model.

    What the layer computes is replaced by what vLLM's own class does. So `found`, the
    class that it had, must be that class, without a part that the encoded forward would
    leave out, and what its rotary embedding and norms run must be vLLM's own code. Raises
    SCXUnsupportedError.
    """
    for name in ("qkv_proj", "o_proj", "attn", "q_size", "kv_size"):
        if not hasattr(attention, name):
            raise SCXUnsupportedError(
                f"{found.__qualname__} has no {name} in this vLLM, on which the encoded "
                f"attention relies: use a version that was run, or unset {ENC_LAYERS}"
            )
    runs = [found.forward] if found is type(attention).__bases__[1] else [found]
    parts: list[Any] = [*attention.norms]
    if attention.turns:
        parts.append(attention.rotary_emb)
    for part in parts:
        # A CustomOp chooses the method that it runs when it is made.
        runs += [type(part), getattr(part, "_forward_method", part.forward)]
    for code in runs:
        if not code.__module__.startswith("vllm."):
            raise SCXUnsupportedError(
                f"attention runs {code.__module__}.{code.__qualname__} here, which "
                "another plugin put in the place of vLLM's own code: leave that plugin "
                f"out, or unset {ENC_LAYERS}"
            )
    if runs[0] is found:
        raise SCXUnsupportedError(
            f"attention is a {found.__qualname__} here, not the class that is encoded: "
            f"unset {ENC_LAYERS}"
        )
    used = [attention.qkv_proj, attention.attn, attention.o_proj, *parts]
    for name, part in attention.named_children():
        if name != "rotary_emb" and all(part is not each for each in used):
            raise SCXUnsupportedError(
                f"{found.__qualname__} has a {name} in this vLLM, which the encoded "
                f"attention would leave out: use a version that was run, or unset "
                f"{ENC_LAYERS}"
            )


def _attach_secure_layers(
    layers: list[SCXAttention], plan: EncodingPlan, root: RootKey
) -> None:
    """Give each layer its secure device's side, with the key that is its own."""
    first = layers[0]
    tables, is_neox_style = tables_of(
        [layer.rotary_emb if layer.turns else None for layer in layers],
        plan.max_model_len,
    )
    rank = Rank(
        num_heads=first.attn.num_heads,
        hidden_size=first.qkv_proj.input_size,
        dtype=plan.dtype,
        max_tokens=plan.max_step_tokens,
        is_neox_style=is_neox_style,
        accelerator=tables[0].device,
        secure_device=torch.device(plan.config.secure_device),
        workers=plan.workers,
    )
    features = {
        layer.layer_index: plan.codec.derive(
            root, layer.layer_index, _global_kv_heads(layer), layer.attn.head_size
        )
        for layer in layers
    }
    secure_layers = devices.build(
        plan.device, features, tables, rank, envs.VLLM_LOG_STATS_INTERVAL
    )
    for layer, secure in zip(layers, secure_layers, strict=True):
        layer.secure = secure


def _global_kv_heads(attention: SCXAttention) -> range:
    """This rank's key/value heads, counted over the whole model.

    With more ranks than heads, several ranks hold the same head
    (QKVParallelLinear in vllm/model_executor/layers/linear.py).
    """
    ranks = get_tensor_model_parallel_world_size()
    replicas = max(1, ranks // attention.qkv_proj.total_num_kv_heads)
    heads = attention.attn.num_kv_heads
    first = get_tensor_model_parallel_rank() // replicas * heads
    return range(first, first + heads)


def _announce(attention: SCXAttention, vllm_config: VllmConfig) -> None:
    """Let the operator find the layer, and vLLM split its graph at the operator."""
    compilation = vllm_config.compilation_config
    if attention.layer_name in compilation.static_forward_context:
        raise SCXUnsupportedError(f"a layer named {attention.layer_name} exists already")
    compilation.static_forward_context[attention.layer_name] = attention
    # An empty list is a graph in one piece, as on the CPU.
    if compilation.splitting_ops and OP_NAME not in compilation.splitting_ops:
        compilation.splitting_ops.append(OP_NAME)
