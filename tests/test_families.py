"""The architectures beyond Llama and Qwen2 that share their attention."""

import json
import shutil

import pytest
import torch

from lab.engines import generate_each, in_new_process
from lab.tiny_models import PROMPTS, ROPE_VARIANTS, save
from scx.codecs import plain


def alias(model, folder, architecture):
    """The same model under another name that vLLM has for its class."""
    shutil.copytree(model, folder)
    config = json.loads((folder / "config.json").read_text())
    config["architectures"] = [architecture]
    (folder / "config.json").write_text(json.dumps(config))
    return folder


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    root = tmp_path_factory.mktemp("families")
    llama = save(root / "llama", "LlamaForCausalLM")
    norms = {"head_dim": 64, "attention_bias": True, "num_key_value_heads": 1}
    qwen3 = save(root / "qwen3", "Qwen3ForCausalLM", **norms)
    # Norms that differ by feature, as trained ones do: fresh ones are all one.
    spread_norms(qwen3)
    return {
        "qwen3": qwen3,
        "mistral": save(root / "mistral", "MistralForCausalLM", sliding_window=64),
        # Its rotation pairs neighbours.
        "ernie 4.5": save(root / "ernie", "Ernie4_5ForCausalLM"),
        "phi-3": save(
            root / "phi3", "Phi3ForCausalLM", pad_token_id=0, num_key_value_heads=4
        ),
        "telechat3": alias(llama, root / "telechat3", "TeleChat3ForCausalLM"),
    }


def spread_norms(model):
    from safetensors.torch import load_file, save_file

    file = model / "model.safetensors"
    weights = load_file(file)
    generator = torch.Generator().manual_seed(0)
    for name, weight in weights.items():
        if name.endswith(("q_norm.weight", "k_norm.weight")):
            weights[name] = 0.5 + torch.rand(weight.shape, generator=generator)
    save_file(weights, file, metadata={"format": "pt"})


def test_tokens_are_native(models):
    runs = [{"model": model, "skip_tokenizer_init": True} for model in models.values()]
    native, encoded = (
        in_new_process(generate_each, runs, PROMPTS, env={"SCX_ENC_LAYERS": layers})
        for layers in ("", "all")
    )
    assert dict(zip(models, encoded, strict=True)) == dict(
        zip(models, native, strict=True)
    )


@pytest.mark.slow
def test_tokens_are_native_compiled_and_affine(models, tmp_path):
    yarn = {"head_dim": 64, "rope_parameters": ROPE_VARIANTS["yarn"]}
    runs = [
        {"model": models["qwen3"], "enforce_eager": False},
        {"model": save(tmp_path / "yarn", "Qwen3ForCausalLM", **yarn)},
        {"model": models["mistral"], "enforce_eager": False},
    ]
    runs = [run | {"skip_tokenizer_init": True} for run in runs]
    cache = {"VLLM_CACHE_ROOT": str(tmp_path / "cache")}
    native = in_new_process(generate_each, runs, PROMPTS, env=cache)
    for name in ("permutation", "affine"):
        env = cache | {"SCX_ENC_LAYERS": "0,2,3", "SCX_CODEC": name}
        assert in_new_process(generate_each, runs, PROMPTS, env=env) == native


@pytest.mark.slow
def test_norms_of_two_tensor_parallel_ranks(models):
    runs = [
        {"model": models["qwen3"], "tensor_parallel_size": 2, "skip_tokenizer_init": True}
    ]
    env = {"VLLM_ENABLE_V1_MULTIPROCESSING": "1", "VLLM_CPU_OMP_THREADS_BIND": "0|1"}
    native = in_new_process(generate_each, runs, PROMPTS, env=env)
    encoded = in_new_process(
        generate_each, runs, PROMPTS, env=env | {"SCX_ENC_LAYERS": "all"}
    )
    assert encoded == native


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_the_norm_is_that_of_transformers(dtype):
    from transformers.models.qwen3.modeling_qwen3 import Qwen3RMSNorm

    reference = Qwen3RMSNorm(16, eps=1e-5).to(dtype)
    torch.nn.init.normal_(reference.weight)
    heads = torch.randn(7, 3 * 16).to(dtype)
    expected = reference(heads.unflatten(-1, (-1, 16))).flatten(-2)
    result = plain.rms_norm(heads, reference.weight.detach(), 1e-5)
    assert result.dtype == dtype
    assert torch.equal(result, expected)
