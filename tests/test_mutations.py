"""The tests would see it: leaving out any one step of the codec changes the tokens."""

import pytest

from scx.commands.demo_model import embedded_model
from tests.engines import engine, greedy, in_new_process, shut_down

PROMPTS = ["The capital of France is", "1, 1, 2, 3, 5, 8, 13,", "Water boils at"]

STEPS = {
    "encode rows": ("embeddings_pi_left", lambda rows, pi: rows),
    "decode rows": ("decode_rows", lambda rows, pi: rows),
    "rotate": ("apply_rotary", lambda heads, *_: heads),
    "encode features": ("encode_features", lambda heads, key: heads),
    "decode features": ("decode_features", lambda heads, key: heads),
}


def tokens_without_each_step(model):
    from scx.codecs import reference as codec

    def tokens():
        llm = engine(model)
        result = greedy(llm, PROMPTS, max_tokens=8)
        shut_down(llm)
        return result

    results = {"nothing": tokens()}
    for step, (name, left_out) in STEPS.items():
        whole = getattr(codec, name)
        setattr(codec, name, left_out)
        results[step] = tokens()
        setattr(codec, name, whole)
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
