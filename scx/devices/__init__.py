"""Where encoding runs: one file per secure device, and the choice between them.

Another device is one more file with a subclass of SecureLayer, and one more branch in
`choose` or `_fused`.
"""

from collections.abc import Mapping, Sequence

import torch

from scx.codecs.interface import FeatureCodec
from scx.devices import metrics, pools, watchdog
from scx.devices.interface import Rank, SecureLayer


def choose(
    secure_device: str, is_cuda: bool, codec: type[FeatureCodec]
) -> type[SecureLayer]:
    """The class that serves a setting of SCX_SECURE_DEVICE.

    `is_cuda` says whether the model runs on CUDA devices.
    """
    fused = _fused(secure_device, codec) if is_cuda else None
    if fused is not None:
        return fused
    from scx.devices.plain import PlainSecureLayer

    return PlainSecureLayer


def _fused(secure_device: str, codec: type[FeatureCodec]) -> type[SecureLayer] | None:
    """The device beside a CUDA device that has fused kernels, if there is one.

    Each is imported if it is chosen: Triton is found only beside a GPU, and vLLM's CPU
    platform scans loaded modules while it starts and stumbles over llvmlite
    (vllm/triton_utils/dispatcher.py). A GPU with an index is a device like any other:
    only plain "cuda" makes each rank's GPU its own secure device.
    """
    if secure_device == "cuda":
        from scx.devices.accelerator import AcceleratorSecureLayer

        return AcceleratorSecureLayer
    if secure_device in ("cpu", "cpu:0") and codec.host_kernels:
        from scx.devices.host import HostSecureLayer

        return HostSecureLayer
    return None


def build(
    device: type[SecureLayer],
    features: Mapping[int, FeatureCodec],
    tables: Sequence[torch.Tensor],
    rank: Rank,
    log_interval: float,
) -> list[SecureLayer]:
    """The secure layers of a rank, each watched and counted.

    `device` is what `choose` returned, `features` holds each layer's codec by its index
    in the model, and `tables` is as in `SecureLayer.build`. Metrics are reported every
    `log_interval` seconds.
    """
    layers = pools.built_outside(
        lambda: device.build(list(features.values()), tables, rank), rank.accelerator
    )
    metrics.count_layers(layers)
    if not device.on_accelerator:
        watchdog.watch(dict(zip(features, layers, strict=True)))
        metrics.Reporter(layers, log_interval).start()
    return list(layers)
