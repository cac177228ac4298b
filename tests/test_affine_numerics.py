"""The affine codec in 16 bits: what it costs, where it says so, and that it is finite."""

import json
from pathlib import Path

import pytest
import torch

from lab.engines import engine, in_new_process, shut_down
from scripts import affine_numerics
from scx.codecs.affine import CONDITION, AffineCodec

RECORD = Path(__file__).parent.parent / "docs" / "affine-numerics.json"


def test_the_record_is_what_the_codec_does():
    recorded = json.loads(RECORD.read_text())["weights_of_attention"]
    for found in recorded:
        within = found["feature"] <= AffineCodec.largest_key_bias
        assert (found["ratio"] < CONDITION) == within
    again = next(f for f in recorded if f["feature"] == 100)
    dtype = getattr(torch, again["dtype"])
    measured = affine_numerics.errors(dtype, again["head_dim"], again["feature"])
    for name, error in measured.items():
        # The same numbers, summed in the order of another machine.
        assert error == pytest.approx(again[name], rel=0.05)


def test_float16_heads_stay_finite_up_to_the_norm_that_is_said():
    (codec,) = affine_numerics.codecs(64)[:1]
    for encode, maps in (
        (codec.encode_keys, codec._key_maps[1].mT),
        (codec.encode_values, codec._value_maps[0]),
    ):
        # The heads that their map stretches most, and toward a single feature.
        worst = torch.nn.functional.normalize(maps, dim=-2).mT
        stretched = torch.linalg.svd(maps)[0].mT
        for heads in (worst, stretched):
            rows = (32752 * heads.transpose(0, 1)).half().flatten(1)
            assert encode(rows).isfinite().all()


def load(model):
    """What the log says while weights load."""
    from scx.models.base import logger

    lines = []
    logger.warning_once = lambda text, *values: lines.append(text % values)
    shut_down(engine(model, skip_tokenizer_init=True, dtype="bfloat16"))
    return lines


def test_a_large_key_bias_is_said_by_layer(tiny_qwen2, tmp_path):
    import transformers

    model = transformers.AutoModelForCausalLM.from_pretrained(tiny_qwen2)
    with torch.no_grad():
        model.model.layers[2].self_attn.k_proj.bias[5] = -150.0
        # Not of keys, hence of no matter.
        model.model.layers[1].self_attn.q_proj.bias[5] = 150.0
    model.save_pretrained(tmp_path)
    env = {"SCX_ENC_LAYERS": "1,2", "SCX_CODEC": "affine"}
    (line,) = in_new_process(load, tmp_path, env=env)
    assert line.startswith("SCX layer 2: a key bias of 150, above 20")
    assert "bfloat16" in line
