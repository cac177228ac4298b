"""Where the secure device may be: not on an accelerator of the engine itself."""

from collections.abc import Iterator
from typing import Any

import torch

from scx.errors import SCXUnsupportedError
from scx.kernels.host.cores import ranks_here
from scx.keys import SECURE_DEVICE, SCXConfig


def obstacles(vllm_config: Any, config: SCXConfig) -> Iterator[str]:
    """Why a numbered secure device would be an accelerator that is not trusted.

    vLLM puts rank i of a host on the device that torch calls i, counted among those
    that are visible, all data-parallel ranks of the host one after another
    (vllm/v1/worker/gpu_worker.py).
    """
    device = torch.device(config.secure_device)
    if not _is_numbered(device) or device.type != vllm_config.device_config.device_type:
        return
    parallel = vllm_config.parallel_config
    if getattr(parallel, "assigned_physical_gpu_ids", None):
        yield (
            f"device_ids may choose {SECURE_DEVICE}={config.secure_device!r} for the "
            "engine too: choose its accelerators by CUDA_VISIBLE_DEVICES"
        )
    elif device.index < (ranks := ranks_here(parallel)):
        yield (
            f"{SECURE_DEVICE}={config.secure_device!r} is an accelerator of this engine, "
            f"which runs on {device.type}:0 to {device.type}:{ranks - 1}: use cpu, or a "
            f"device from {device.type}:{ranks} on"
        )


def require_apart(secure: torch.device, accelerator: torch.device) -> None:
    """Refuse a numbered secure device that is this rank's accelerator.

    Every rank compares, before weights load: Ray, for example, may have numbered the
    accelerators differently from `obstacles`. Raises SCXUnsupportedError.
    """
    if _is_numbered(secure) and secure == accelerator:
        raise SCXUnsupportedError(
            f"{SECURE_DEVICE}={str(secure)!r} is the accelerator of this rank: use cpu, "
            "or a device that the engine does not run on"
        )


def _is_numbered(device: torch.device) -> bool:
    """Whether `device` has a number that must differ from the accelerator's.

    Without a number each accelerator is its own secure device, as the user asked. A CPU
    has no other number, and nothing is kept from it if it is the accelerator.
    """
    return device.index is not None and device.type != "cpu"
