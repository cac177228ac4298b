"""Rotary embeddings as vLLM builds them, by name."""

import torch

from lab import tiny_models
from tests import longrope

HEAD_DIM = 32
POSITIONS = 1024
ROPES = (
    tiny_models.ROPE_VARIANTS
    | {
        "dynamic with alpha": {"rope_type": "dynamic", "rope_theta": 1e4, "alpha": 4.0},
        "ntk": {"rope_type": "ntk", "rope_theta": 1e4, "factor": 2.0},
        "partial": {"rope_theta": 1e4, "partial_rotary_factor": 0.5},
    }
    | longrope.VARIANTS
)


def build(rope, dtype=torch.float32, max_model_len=256):
    """What vLLM builds of rope_parameters, in an engine of that length."""
    from unittest import mock

    from vllm.config import VllmConfig, set_current_vllm_config
    from vllm.model_executor.layers.rotary_embedding import get_rope
    from vllm.model_executor.layers.rotary_embedding import (
        phi3_long_rope_scaled_rope as vllms_longrope,
    )

    length = mock.Mock(**{"return_value.model_config.max_model_len": max_model_len})
    with (
        set_current_vllm_config(VllmConfig()),
        mock.patch.object(vllms_longrope, "get_current_vllm_config", length),
        mock.patch("vllm.model_executor.layers.rotary_embedding._ROPE_DICT", {}),
    ):
        return get_rope(HEAD_DIM, POSITIONS, True, dict(rope), dtype)
