"""Reward models of Qwen2 with encoded attention in chosen layers."""

from vllm.model_executor.models.qwen2_rm import (
    Qwen2ForProcessRewardModel,
    Qwen2ForRewardModel,
)

from scx.models.base import SCXForCausalLM
from scx.models.qwen2_scx import Qwen2SCXAttention


class Qwen2SCXForRewardModel(SCXForCausalLM, Qwen2ForRewardModel):
    """Qwen2ForRewardModel whose layers in SCX_ENC_LAYERS run encoded."""

    attention_class = Qwen2SCXAttention


class Qwen2SCXForProcessRewardModel(SCXForCausalLM, Qwen2ForProcessRewardModel):
    """Qwen2ForProcessRewardModel whose layers in SCX_ENC_LAYERS run encoded."""

    attention_class = Qwen2SCXAttention
