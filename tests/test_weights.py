"""Weights that change under a running engine: the tokens are those of a native engine
whose weights change in the same ways."""

import itertools

import pytest

from lab.engines import engine, greedy, in_new_process, shut_down
from lab.tiny_models import PROMPTS, save
from scx.keys import CODECS


def state(folder):
    from safetensors.torch import load_file

    return load_file(folder / "model.safetensors").items()


def load_in_pieces(worker, folder):
    """As vLLM's weight transfer: a layer that lacks some of its weights is on the meta
    device until the piece that completes it."""
    from vllm.model_executor.model_loader.reload import layerwise

    loaded = worker.model_runner.get_model()
    layerwise.initialize_layerwise_reload(loaded)
    for weight in state(folder):
        loaded.load_weights([weight])
    layerwise.finalize_layerwise_reload(loaded, worker.model_config)


# The weights of projections are packed on a CPU, so nothing can be written to them there.


def load_norms(worker, folder):
    """As the extensions of RL trainers: straight into the model."""
    norms = [(name, 2 * norm) for name, norm in state(folder) if "layernorm" in name]
    worker.model_runner.get_model().load_weights(norms)


def turn_norms(worker):
    """As a trainer that shares the memory of the weights."""
    for layer in worker.model_runner.get_model().model.layers:
        layer.input_layernorm.weight.data.mul_(-0.5)


def secure_layers(worker):
    """Which ones serve, and how many steps each counted."""
    encoded = getattr(worker.model_runner.get_model(), "encoded", [])
    return [(id(each.secure), each.secure.traffic.steps) for each in encoded]


def update(first, second, **engine_args):
    """Tokens of the first model, and after each way to change its weights; and the secure
    layers at each of these times."""
    llm = engine(
        first, skip_tokenizer_init=True, enable_prefix_caching=True, **engine_args
    )

    def run():
        llm.reset_prefix_cache()
        return greedy(llm, PROMPTS), llm.collective_rpc(secure_layers)[0]

    results = [run()]
    # On a CPU, vLLM lets the engine pause, and keeps its memory.
    for level in (1, 2):
        llm.sleep(level)
        llm.wake_up()
        results.append(run())
    for method, *arguments in (
        ("reload_weights", None, str(second)),
        (load_in_pieces, first),
        (load_norms, second),
        (turn_norms,),
    ):
        llm.collective_rpc(method, args=tuple(arguments))
        results.append(run())
    shut_down(llm)
    tokens, secure = zip(*results, strict=True)
    return tokens, secure


@pytest.fixture(scope="module")
def models(tiny_qwen2, tmp_path_factory):
    """Two whose weights differ."""
    folder = tmp_path_factory.mktemp("second")
    shape = {"tie_word_embeddings": True, "initializer_range": 0.3}
    return tiny_qwen2, save(folder, "Qwen2ForCausalLM", **shape)


@pytest.fixture(scope="module")
def native(models):
    return in_new_process(update, *models)[0]


@pytest.mark.parametrize("codec", CODECS)
def test_tokens_follow_the_weights(codec, models, native):
    first, asleep, deeper, reloaded, back, loaded, turned = native
    assert first == asleep == deeper == back
    for other in (reloaded, loaded, turned):
        assert other != first
    assert loaded != turned
    env = {"SCX_ENC_LAYERS": "all", "SCX_CODEC": codec}
    tokens, secure = in_new_process(update, *models, env=env)
    assert tokens == native
    # The layers and their keys are the same all along, and go on counting.
    assert len(secure[0]) == 4
    for before, after in itertools.pairwise(secure):
        assert [layer for layer, _ in before] == [layer for layer, _ in after]
        for (_, less), (_, more) in zip(before, after, strict=True):
            assert less < more


def load_again(model):
    """The biases that an engine begins with, and those after an update in pieces."""
    llm = engine(model, skip_tokenizer_init=True, dtype="bfloat16")

    def biases(loaded):
        return [layer.self_attn.qkv_proj.bias.clone() for layer in loaded.model.layers]

    (before,) = llm.apply_model(biases)
    llm.collective_rpc(load_in_pieces, args=(model,))
    (after,) = llm.apply_model(biases)
    shut_down(llm)
    return before, after


def test_pieces_of_16_bits_whose_biases_are_looked_at(tiny_qwen2):
    env = {"SCX_ENC_LAYERS": "all", "SCX_CODEC": "affine"}
    before, after = in_new_process(load_again, tiny_qwen2, env=env)
    assert len(before) == 4
    for ours, theirs in zip(after, before, strict=True):
        assert ours.equal(theirs)
        assert ours.any()
