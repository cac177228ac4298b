"""What vLLM is told before weights load, in the process that creates the engine.

Names of vLLM that this leans on are listed, with versions, in docs/vllm-seams.md.
"""

import logging
from typing import TYPE_CHECKING, Any, cast

from scx import keys
from scx.keys import SECURE_DEVICE, get_scx_config
from scx.plugin import kv_store, refusals, versions
from scx.plugin.architectures import register
from scx.plugin.plan import RECORD, EncodingPlan

if TYPE_CHECKING:
    from vllm.config import VllmConfig

# Under vLLM's root logger, so that its handlers and levels apply.
_logger = logging.getLogger("vllm.scx")


def configure(vllm_config: "VllmConfig") -> None:
    """Refuse what cannot be encoded; write the plan's record; choose the graph mode.

    If no layer is to be encoded, prepares sealed tiers and changes nothing else. Raises
    SCXConfigError for a setting that does not fit the model or changed too late, and
    SCXUnsupportedError for a model or feature that would not run encoded.
    """
    register()
    config = get_scx_config()
    keys.require_unchanged(config)
    if not config.enabled:
        kv_store.require_unlabelled(vllm_config)
        kv_store.prepare_tiers(vllm_config, config, record=None)
        return
    model_config = vllm_config.model_config
    if model_config is None:
        return
    refusals.refuse(config, refusals.model_obstacles(model_config))
    keys.require_key_file(config)
    plan = EncodingPlan.make(config, vllm_config)
    refusals.refuse(config, refusals.feature_obstacles(vllm_config, plan))
    additional = cast("dict[str, Any]", vllm_config.additional_config)
    additional[RECORD] = plan.record
    kv_store.prepare_tiers(vllm_config, config, plan.record)
    # Each worker does so as well, with the key file of its own machine.
    if kv_store.outlives_engine(vllm_config):
        _logger.warning(
            "SCX: %s is deprecated here, as it does not seal KV: use a sealed tier",
            kv_store.connector_of(vllm_config),
        )
        kv_store.claim(vllm_config, plan.root_key().fingerprint, plan.record)
    # A worker that lacks our variables then builds our class all the same, and that
    # class refuses to run without them.
    _, class_name = plan.architecture.encoded.split(":")
    model_config.hf_config.architectures = [class_name]
    if not plan.device.in_graphs:
        _use_piecewise_graphs(vllm_config, config.secure_device)
    if warning := versions.unknown():
        _logger.warning("SCX: %s", warning)
    vllm_config.compilation_config.pass_config.fuse_attn_quant = False


def _use_piecewise_graphs(vllm_config: "VllmConfig", secure_device: str) -> None:
    """Keep whole-step CUDA graphs off: the secure step synchronises with Python."""
    from vllm.config import CUDAGraphMode
    from vllm.platforms import current_platform

    compilation = vllm_config.compilation_config
    if compilation.cudagraph_mode in (None, CUDAGraphMode.FULL_AND_PIECEWISE):
        compilation.cudagraph_mode = CUDAGraphMode.PIECEWISE
        if current_platform.is_cuda_alike():
            _logger.warning(
                "SCX: with secure device %s each step waits for Python, so CUDA graphs "
                "are PIECEWISE and decoding is several times slower; whole graphs need "
                "%s=cpu or cuda",
                secure_device,
                SECURE_DEVICE,
            )
