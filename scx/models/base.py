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

from scx import codecs
from scx.devices import metrics, placement, watchdog
from scx.devices.plain import SecureLayer
from scx.errors import SCXNotEncodedError, SCXUnsupportedError
from scx.keys import ENC_LAYERS, RootKey, SCXConfig, get_scx_config
from scx.models.attention import OP_NAME, SCXAttention, logger
from scx.plugin import configure as engine
from scx.plugin.rotary import table_of


class SCXForCausalLM(nn.Module):
    """Mixed in before a stock class: encodes the layers that the engine recorded.

    The stock constructor builds the model; then the attention of each chosen
    layer is converted in place. Nothing of the other layers is touched.
    """

    attention_class: type[SCXAttention]
    """The encoded attention, whose second base is the stock one."""

    model: Any

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = "") -> None:
        super().__init__(vllm_config=vllm_config, prefix=prefix)
        here = range(self.model.start_layer, self.model.end_layer)
        chosen = [i for i in engine.encoded_layers(vllm_config) if i in here]
        self.encoded = [self.model.layers[i].self_attn for i in chosen]
        if not chosen:
            return
        config = get_scx_config()
        root = engine.root_key(vllm_config)
        engine.claim_store(vllm_config, root)
        for index, attention in zip(chosen, self.encoded, strict=True):
            engine.require_cache(attention.attn.kv_cache_dtype, config)
            found, attention.__class__ = type(attention), self.attention_class
            _require_stock(found, attention)
            attention.layer_index = index
            attention.layer_name = attention.attn.layer_name.removesuffix(".attn")
            attention.debug = config.enable_debug
            attention.key_fingerprint = root.fingerprint
            _announce(attention, vllm_config)
        _attach_secure_layers(self.encoded, vllm_config, config, root)
        secure_layers = [attention.secure for attention in self.encoded]
        metrics.count_layers(secure_layers)
        # An accelerator's own counters cannot be read without a wait for it.
        if not engine.uses_accelerator(config, vllm_config.model_config):
            metrics.Reporter(secure_layers, envs.VLLM_LOG_STATS_INTERVAL).start()
        logger.info(
            "SCX encodes the attention of layers %s of %s: %s codec, secure device %s, "
            "graph mode %s, key %s",
            ",".join(map(str, chosen)),
            type(self).__name__,
            config.codec,
            config.secure_device,
            getattr(vllm_config.compilation_config.cudagraph_mode, "name", "NONE"),
            root.fingerprint,
        )

    def encodes(self, layers: list[int]) -> bool:
        """Whether each of these layers that is on this rank has encoded attention."""
        here = range(self.model.start_layer, self.model.end_layer)
        return all(
            isinstance(self.model.layers[i].self_attn, SCXAttention)
            for i in layers
            if i in here
        )

    def forward(
        self,
        input_ids: torch.Tensor | None,
        positions: torch.Tensor,
        intermediate_tensors: Any = None,
        inputs_embeds: torch.Tensor | None = None,
    ) -> Any:
        """As the stock class.

        Raises SCXNotEncodedError where an encoded layer did not run encoded,
        as with a stale compiled graph. vLLM's profiling run comes through here,
        so that happens before the first request.
        """
        calls = [attention.calls for attention in self.encoded]
        result = super().forward(
            input_ids, positions, intermediate_tensors, inputs_embeds
        )
        for attention, before in zip(self.encoded, calls, strict=True):
            if attention.calls == before:
                raise SCXNotEncodedError(
                    f"layer {attention.layer_index} ran without its secure device: a "
                    "stale compiled graph was loaded; set VLLM_DISABLE_COMPILE_CACHE=1"
                )
        return result

    def load_weights(self, weights: Iterable[tuple[str, torch.Tensor]]) -> set[str]:
        """As the stock class. Warns of key biases that cost the codec accuracy."""
        stock: Any = super()
        loaded = stock.load_weights(weights)
        codec = codecs.load(get_scx_config().codec)
        for attention in self.encoded:
            bias = attention.qkv_proj.bias
            if bias is None or bias.dtype == torch.float32:
                continue
            keys = bias[attention.q_size : attention.q_size + attention.kv_size]
            if (largest := keys.abs().max().item()) > codec.largest_key_bias:
                logger.warning(
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
    """Refuse an attention layer that another plugin changed: it would be another model.

    What the layer computes is replaced by what vLLM's own class does. So `found`, the
    class that it had, must be that class, and what its rotary embedding and norms run
    must be vLLM's own code. Raises SCXUnsupportedError.
    """
    runs = [found.forward] if found is type(attention).__bases__[1] else [found]
    for part in (attention.rotary_emb, *attention.head_norms):
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


def _attach_secure_layers(
    layers: list[SCXAttention], vllm_config: VllmConfig, config: SCXConfig, root: RootKey
) -> None:
    """Give each layer its secure device's side, with the key that is its own."""
    codec = codecs.load(config.codec)
    features = [
        codec.derive(root, layer.layer_index, _global_kv_heads(layer), layer.head_dim)
        for layer in layers
    ]
    rotary = table_of(
        [layer.rotary_emb for layer in layers], vllm_config.model_config.max_model_len
    )
    if engine.uses_host_device(config, vllm_config.model_config):
        # Here and not above: vLLM's CPU platform scans all modules while it starts
        # and stumbles over llvmlite (vllm/triton_utils/dispatcher.py).
        from scx.devices.host import HostDevice, HostSecureLayer

        host = HostDevice(
            features,
            rotary.cos_sin_cache,
            rotary.is_neox_style,
            layers[0].num_heads,
            layers[0].hidden_size,
            engine.max_step_tokens(vllm_config),
            vllm_config.model_config.dtype,
            rotary.cos_sin_cache.device,
            engine.host_workers(vllm_config),
        )
        for slot, layer in enumerate(layers):
            layer.secure = HostSecureLayer(host, slot)
        watchdog.watch({layer.layer_index: layer.secure for layer in layers})
        logger.info(
            "SCX host device: %d workers, %.1f MiB pinned",
            len(host.workers.threads),
            host.mailbox.nbytes / 2**20,
        )
        return
    device, secure_layer = torch.device(config.secure_device), SecureLayer
    if engine.uses_accelerator(config, vllm_config.model_config):
        # Here, because Triton is found on machines with a GPU only.
        from scx.devices.accelerator import AcceleratorSecureLayer

        device, secure_layer = rotary.cos_sin_cache.device, AcceleratorSecureLayer
    placement.require_apart(
        torch.device(config.secure_device), rotary.cos_sin_cache.device
    )
    cos_sin_cache = rotary.cos_sin_cache.to(device)
    watched = {}
    for layer, its_features in zip(layers, features, strict=True):
        secure = secure_layer(
            device, its_features, cos_sin_cache, rotary.is_neox_style, layer.num_heads
        )
        secure.norms = layer.head_norms
        layer.secure = watched[layer.layer_index] = secure
    watchdog.watch(watched)


def _global_kv_heads(attention: SCXAttention) -> range:
    """This rank's key/value heads, counted over the whole model.

    With more ranks than heads, several ranks hold the same head
    (QKVParallelLinear in vllm/model_executor/layers/linear.py).
    """
    ranks = get_tensor_model_parallel_world_size()
    replicas = max(1, ranks // attention.total_num_kv_heads)
    first = get_tensor_model_parallel_rank() // replicas * attention.num_kv_heads
    return range(first, first + attention.num_kv_heads)


def _announce(attention: SCXAttention, vllm_config: VllmConfig) -> None:
    """Let the operator find the layer, and vLLM split its graph at the operator."""
    compilation = vllm_config.compilation_config
    if attention.layer_name in compilation.static_forward_context:
        raise SCXUnsupportedError(f"a layer named {attention.layer_name} exists already")
    compilation.static_forward_context[attention.layer_name] = attention
    # An empty list is a graph in one piece, as on the CPU.
    if compilation.splitting_ops and OP_NAME not in compilation.splitting_ops:
        compilation.splitting_ops.append(OP_NAME)
