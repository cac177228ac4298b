"""The rotary table that is used is the one by which vLLM's own class turns."""

import pytest
import torch
from torch import nn

from lab import tiny_models
from lab.engines import generate_each, in_new_process
from scx.codecs import plain
from scx.errors import SCXUnsupportedError
from scx.plugin import rotary
from tests import longrope
from tests.ropes import HEAD_DIM, POSITIONS, ROPES, build

OTHER = {
    "three positions": {"rope_type": "default", "mrope_section": [4, 6, 6]},
    "deepseek": {
        "rope_type": "deepseek_yarn",
        "factor": 2.0,
        "original_max_position_embeddings": 512,
    },
}


class Config:
    max_position_embeddings = POSITIONS

    def __init__(self, rope):
        self.rope_parameters = rope


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("max_model_len", [256, 1024])
@pytest.mark.parametrize("name", ROPES)
def test_the_table_turns_as_vllm_does(name, max_model_len, dtype):
    vllms = build(ROPES[name], dtype, max_model_len)
    (table, same), is_neox_style = rotary.tables_of([vllms, vllms], max_model_len)
    assert table is same
    assert table.dtype == dtype
    positions = torch.tensor([0, 1, 7, max_model_len - 1])
    heads = torch.randn(4, 3 * HEAD_DIM, generator=torch.manual_seed(0)).to(dtype)
    turned = plain.apply_rotary(heads, positions, table, HEAD_DIM, is_neox_style)
    turn = getattr(vllms, "forward_native", vllms.forward)
    expected, _ = turn(positions, heads.clone(), heads.clone())
    # Where vLLM rounds each product and sum, we round once.
    close = torch.finfo(dtype).eps * 8
    assert torch.allclose(turned, expected, atol=close, rtol=close)


@pytest.mark.parametrize("max_model_len", [256, 1024])
@pytest.mark.parametrize("name", ROPES)
def test_the_configuration_says_how_many_rows_the_table_has(name, max_model_len):
    vllms = build(ROPES[name], max_model_len=max_model_len)
    (table,), _ = rotary.tables_of([vllms], 1)
    rows, config = len(table), Config(ROPES[name])
    # More than the longrope's original is the long table, whose length counts then.
    longer = POSITIONS if "longrope" in name else rows
    assert list(rotary.obstacles(config, min(rows, max_model_len))) == []
    assert list(rotary.obstacles(config, longer)) == []
    (beyond,) = rotary.obstacles(config, longer + 1)
    assert beyond.startswith(f"max_model_len={longer + 1} goes beyond")
    assert beyond.endswith(f"has {longer} positions: set it to {longer} at most")


def test_positions_beyond_the_table_are_refused_in_the_worker_too():
    vllms = build(ROPES["default"])
    (table,), _ = rotary.tables_of([vllms], POSITIONS)
    assert len(table) == POSITIONS
    with pytest.raises(SCXUnsupportedError, match="max_model_len=1025 goes beyond"):
        rotary.tables_of([vllms], POSITIONS + 1)


@pytest.mark.parametrize("name", OTHER)
def test_what_is_no_table_is_refused_before_it_is_built_and_after(name):
    assert len(list(rotary.obstacles(Config(OTHER[name]), 256))) == 1
    with pytest.raises(SCXUnsupportedError, match="is more than a table of"):
        rotary.tables_of([build(OTHER[name])], 256)


def test_another_class_and_layers_that_turn_other_features_are_refused():
    with pytest.raises(SCXUnsupportedError, match="Identity is more than a table"):
        rotary.tables_of([nn.Identity()], 256)
    with pytest.raises(SCXUnsupportedError, match="turn other features in other layers"):
        rotary.tables_of([build(ROPES["default"]), build(ROPES["partial"])], 256)


def test_each_layer_has_the_table_of_its_own_embedding():
    default, linear = build(ROPES["default"]), build(ROPES["linear"])
    tables, _ = rotary.tables_of([default, None, linear, default], 256)
    assert tables[0] is tables[3] is default.cos_sin_cache
    assert tables[2] is linear.cos_sin_cache
    assert tables[1].shape == (1, HEAD_DIM)


@pytest.mark.parametrize("others", [[], ["default"], ["partial"]])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_heads_of_a_layer_without_rope_stay_as_they_are(others, dtype):
    embeddings = [None, *(build(ROPES[name], dtype) for name in others)]
    (table, *_), is_neox_style = rotary.tables_of(embeddings, 256)
    heads = torch.randn(4, 3 * HEAD_DIM).to(dtype)
    positions = torch.tensor([0, 1, 7, 1 << 40])
    turned = plain.apply_rotary(heads, positions, table, HEAD_DIM, is_neox_style)
    assert torch.equal(turned, heads)


@pytest.mark.parametrize(
    ("rope", "text"),
    [
        ({"rope_type": "mllama4"}, "rope_type='mllama4' is not encoded: use a model"),
        ({"rope_type": "default", "use_fope": True}, "use_fope in rope_parameters"),
        (
            {
                "full_attention": {"rope_type": "mllama4"},
                "sliding_attention": {"rope_type": "default"},
            },
            "rope_type='mllama4' is not encoded",
        ),
    ],
)
def test_what_cannot_be_encoded_is_named(rope, text):
    (obstacle,) = rotary.obstacles(Config(rope), 256)
    assert text in obstacle
    assert len(obstacle.splitlines()) == 1


def test_longrope_gives_native_tokens(tmp_path):
    """As in Phi-3-mini-128k and Phi-4-mini."""
    runs = longrope.runs(tmp_path, {})
    native, encoded = (
        in_new_process(
            generate_each, runs, tiny_models.PROMPTS, env={"SCX_ENC_LAYERS": layers}
        )
        for layers in ("", "0,3")
    )
    assert encoded == native
