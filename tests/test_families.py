"""Each architecture that is encoded says what it says natively, as tiny random models.

Engines of one setting share a process, in which each takes some seconds. vLLM inspects a
class that it has not seen on a machine for longer than that, so `make test` runs one
architecture for each thing that attention can do, and the others are slow.
"""

import json
import math
import shutil

import pytest
import torch

from lab.engines import (
    differences,
    engine,
    generate_each,
    in_new_process,
    logprobs,
    shut_down,
)
from lab.tiny_models import FAMILIES, PROMPTS, ROPE_VARIANTS, save
from scx import codecs
from scx.keys import CODECS
from scx.plugin.architectures import (
    ARCHITECTURES,
    Trait,
    encoded_architectures,
)
from scx.plugin.refusals import clashes

# More of what some models of an architecture have: name, architecture, configuration.
VARIANTS = {
    "Granite, RoPE in some layers": (
        "GraniteForCausalLM",
        {
            "attention_multiplier": 0.2,
            "attention_sinks": False,
            "layer_types": ["full_attention", "sliding_attention"] * 2,
            "layer_rope_theta": [0, 1e4, 1e6, 0],
            "sliding_window": 64,
            "pad_token_id": None,
        },
    ),
    "Granite-MoE, RoPE in some layers": (
        "GraniteMoeForCausalLM",
        FAMILIES["GraniteMoeForCausalLM"] | {"layer_rope_theta": [0, 1e4, 1e6, 0]},
    ),
    "Qwen2 with norms": ("Qwen2ForCausalLM", {"qk_norm": True}),
    "Qwen3, yarn": (
        "Qwen3ForCausalLM",
        {"head_dim": 64, "rope_parameters": ROPE_VARIANTS["yarn"]},
    ),
}
MODELS = {name: (name, config) for name, config in FAMILIES.items()} | VARIANTS

QUICK = (
    "Cohere2ForCausalLM",
    "Gemma2ForCausalLM",
    "Gemma3ForCausalLM",
    "GptOssForCausalLM",
    "OlmoeForCausalLM",
    "Qwen3ForCausalLM",
)
REST = tuple(name for name in MODELS if name not in QUICK)

# Of log-probabilities. Sums of float32 in another order differ by 1e-7 of their size,
# which models of large random weights grow to 1.3e-4 at most, as was seen here. Tokens
# are the native ones, unless two are nearly as likely.
LARGEST = 1e-3


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """A function that makes the models of some names."""
    root = tmp_path_factory.mktemp("families")

    def made(names):
        for name in names:
            if not (root / name).exists():
                architecture, config = MODELS[name]
                save(root / name, architecture, **config)
                if config.get("qk_norm"):
                    add_norms(root / name)
        return {name: root / name for name in names}

    return made


def add_norms(model):
    """Those that transformers' class of Qwen2 does not have, and vLLM's has."""
    from safetensors.torch import load_file, save_file

    file = model / "model.safetensors"
    weights, generator = load_file(file), torch.Generator().manual_seed(0)
    for layer in range(4):
        for norm in ("q_norm", "k_norm"):
            name = f"model.layers.{layer}.self_attn.{norm}.weight"
            weights[name] = 0.5 + torch.rand(32, generator=generator)
    save_file(weights, file, metadata={"format": "pt"})


def built_traits(model):
    """What the encoded attention of a loaded model does, as far as its parts show it."""
    from scx.models.attention import SCXAttention

    layers = [each for each in model.modules() if isinstance(each, SCXAttention)]
    ropes = {id(layer.rotary_emb) if layer.turns else None for layer in layers}
    shown = {
        Trait.SINKS: any(layer.attn.has_sink for layer in layers),
        Trait.SOFT_CAPS: any(layer.attn.impl.logits_soft_cap for layer in layers),
        Trait.ROPE_BY_LAYER: len(ropes) > 1,
    }
    return len(layers), {trait for trait, shows in shown.items() if shows}


def answers(models, engine_args):
    """By name: the likeliest tokens and their log-probabilities, the number of encoded
    layers and what they do."""
    said = {}
    for name, folder in models.items():
        llm = engine(folder, skip_tokenizer_init=True, **engine_args)
        said[name] = logprobs(llm, PROMPTS), *llm.apply_model(built_traits)[0]
        shut_down(llm)
    return said


def assert_native(models, env=None, **engine_args):
    """In all layers, under each codec that is allowed. Returns what the layers do."""
    rows, env = encoded_architectures(), env or {}
    native, done = in_new_process(answers, models, engine_args, env=env), {}
    for codec in CODECS:
        allowed = {
            name: folder
            for name, folder in models.items()
            if not clashes(codecs.load(codec), rows[MODELS[name][0]])
        }
        setting = env | {"SCX_ENC_LAYERS": "all", "SCX_CODEC": codec}
        encoded = in_new_process(answers, allowed, engine_args, env=setting)
        for name, (ours, layers, traits) in encoded.items():
            theirs, *_ = native[name]
            assert layers == 4, name
            assert max(differences(ours, theirs)) < LARGEST, (name, codec)
            for mine, other in zip(ours, theirs, strict=True):
                assert gap_where_they_part(mine, other) < LARGEST, (name, codec)
            assert traits <= rows[MODELS[name][0]].traits, name
            done[name] = traits
    return done


def gap_where_they_part(ours, theirs):
    """How much likelier the native token is natively, where two answers first differ."""
    for mine, other in zip(ours, theirs, strict=True):
        token, native = (max(step, key=step.get) for step in (mine, other))
        if token != native:
            return other[native] - other.get(token, -math.inf)
    return 0.0


def test_every_architecture_has_a_tiny_model():
    rows = encoded_architectures()
    generating = {row for row in ARCHITECTURES if row.name.endswith("ForCausalLM")}
    assert {rows[architecture] for architecture, _ in MODELS.values()} == generating


def test_the_quick_ones_do_all_that_attention_can_do():
    rows = encoded_architectures()
    done = set().union(*(rows[name].traits for name in QUICK))
    assert done == set(Trait)


@pytest.mark.parametrize(
    "names", [QUICK, pytest.param(REST, marks=pytest.mark.slow)], ids=["quick", "rest"]
)
def test_an_encoded_model_says_what_it_says_natively(names, folders):
    done = assert_native(folders(names))
    assert set(done) == set(names)


@pytest.mark.slow
@pytest.mark.parametrize("name", QUICK)
def test_so_does_a_compiled_one(name, folders, tmp_path):
    env = {"VLLM_CACHE_ROOT": str(tmp_path / "cache")}
    assert assert_native(folders([name]), env, enforce_eager=False)


@pytest.mark.slow
def test_sinks_and_norms_of_two_tensor_parallel_ranks(folders):
    names = ("CohereForCausalLM", "GptOssForCausalLM", "Qwen3ForCausalLM")
    env = {"VLLM_ENABLE_V1_MULTIPROCESSING": "1", "VLLM_CPU_OMP_THREADS_BIND": "0|1"}
    runs = [
        {"model": folder, "tensor_parallel_size": 2, "skip_tokenizer_init": True}
        for folder in folders(names).values()
    ]
    native, encoded = (
        in_new_process(generate_each, runs, PROMPTS, env=env | {"SCX_ENC_LAYERS": layers})
        for layers in ("", "all")
    )
    assert encoded == native


def test_another_name_of_a_class(folders, tmp_path):
    """As vLLM has for models that are Llama's in all but name."""
    (llama,) = folders(["LlamaForCausalLM"]).values()
    alias = tmp_path / "telechat3"
    shutil.copytree(llama, alias)
    config = json.loads((alias / "config.json").read_text())
    config["architectures"] = ["TeleChat3ForCausalLM"]
    (alias / "config.json").write_text(json.dumps(config))
    runs = [{"model": alias, "skip_tokenizer_init": True}]
    native, encoded = (
        in_new_process(generate_each, runs, PROMPTS, env={"SCX_ENC_LAYERS": layers})
        for layers in ("", "all")
    )
    assert encoded == native
