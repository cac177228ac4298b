"""Real weights: encoded engines give the native tokens.

In float32 the encoded layer differs from the native one by the order of sums
over a head's features, some 1e-6 of a logit's size; the smallest gap between
the best and the second logit of these runs is larger, so tokens are equal.
"""

import itertools

import pytest

from lab.engines import generate_each, in_new_process
from lab.prompts import MIXED
from scx.commands.demo_model import embedded_model

TOKENS = 24


def cases(*quick):
    """Each architecture with each choice of layers; all but the `quick` ones are slow."""
    everything = itertools.product(("llama", "qwen2"), ("0", "0,29", "all"))
    return pytest.mark.parametrize(
        ("architecture", "layers"),
        [
            pytest.param(*case, marks=() if case in quick else pytest.mark.slow)
            for case in everything
        ],
    )


@pytest.fixture(scope="module")
def native_tokens():
    known = {}

    def tokens(architecture):
        if architecture not in known:
            run = {"model": embedded_model(architecture)}
            known[architecture], again = in_new_process(
                generate_each, [run, run], MIXED, TOKENS
            )
            assert known[architecture] == again, "native runs differ from each other"
        return known[architecture]

    return tokens


def encoded_tokens(architecture, layers, codec="permutation", **engine_args):
    run = {"model": embedded_model(architecture)} | engine_args
    env = {"SCX_ENC_LAYERS": layers, "SCX_CODEC": codec}
    return in_new_process(generate_each, [run], MIXED, TOKENS, env=env)[0]


@cases(("llama", "all"), ("qwen2", "0,29"))
def test_eager_tokens_are_native(architecture, layers, native_tokens):
    assert encoded_tokens(architecture, layers) == native_tokens(architecture)


@cases()
def test_compiled_tokens_are_native(architecture, layers, native_tokens):
    tokens = encoded_tokens(architecture, layers, enforce_eager=False)
    assert tokens == native_tokens(architecture)


@cases(("qwen2", "all"))
def test_affine_tokens_are_native(architecture, layers, native_tokens):
    tokens = encoded_tokens(architecture, layers, "affine")
    assert tokens == native_tokens(architecture)
