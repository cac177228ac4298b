import pytest

from tests import tiny_models


@pytest.fixture(scope="session")
def tiny(tmp_path_factory):
    """Paths of tiny models by name, each made on first use."""
    made = {}

    def path(name, architecture, **config):
        if name not in made:
            folder = tmp_path_factory.mktemp("models") / name
            made[name] = tiny_models.save(folder, architecture, **config)
        return made[name]

    return path


@pytest.fixture(scope="session")
def tiny_llama(tiny):
    """Llama with a head_dim of its own: 4 heads of 64 on 128 hidden features."""
    return tiny("llama", "LlamaForCausalLM", head_dim=64)


@pytest.fixture(scope="session")
def tiny_qwen2(tiny):
    """Qwen2 with non-zero biases and tied embeddings."""
    return tiny("qwen2", "Qwen2ForCausalLM", tie_word_embeddings=True)
