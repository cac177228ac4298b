"""The tests would see it: leaving out any one step of the codec changes the tokens."""

from unittest import mock

import pytest

from lab.engines import engine, greedy, in_new_process, shut_down
from scx.commands.demo_model import embedded_model

PROMPTS = ["The capital of France is", "1, 1, 2, 3, 5, 8, 13,", "Water boils at"]

STEPS = {
    "encode rows": ("rows.encode_rows", lambda rows, pi: rows),
    "decode rows": ("rows.decode_rows", lambda rows, pi: rows),
    "rotate": ("plain.apply_rotary", lambda heads, *_: heads),
    "encode features": ("permutation.encode_features", lambda heads, key: heads),
    "decode features": ("permutation.decode_features", lambda heads, key: heads),
}


def tokens_without_each_step(model):
    def tokens():
        llm = engine(model)
        result = greedy(llm, PROMPTS, max_tokens=8)
        shut_down(llm)
        return result

    results = {"nothing": tokens()}
    for step, (name, left_out) in STEPS.items():
        with mock.patch(f"scx.codecs.{name}", left_out):
            results[step] = tokens()
    results["nothing again"] = tokens()
    return results


@pytest.fixture(scope="module")
def mutants():
    env = {"SCX_ENC_LAYERS": "0,29"}
    return in_new_process(tokens_without_each_step, embedded_model("llama"), env=env)


@pytest.mark.parametrize("step", STEPS)
def test_leaving_out_a_step_is_seen(step, mutants):
    assert mutants["nothing"] == mutants["nothing again"]
    assert mutants[step] != mutants["nothing"]
