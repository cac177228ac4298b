"""One key file and two models: which models are two."""

import json
import os
import shutil
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file, save_file

from lab import tiny_models
from lab.root_keys import identity as identity_of_folder
from scx.plugin import identity

SHAPE = {"head_dim": 64, "num_hidden_layers": 2}


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("identity") / "model"
    return tiny_models.save(folder, "LlamaForCausalLM", **SHAPE)


@pytest.fixture
def copy(model, tmp_path):
    return shutil.copytree(model, tmp_path / "elsewhere" / "named otherwise")


def edit(folder, **changes):
    file = folder / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))
    return identity_of_folder(folder)


def test_it_is_a_name_that_may_be_shown(model):
    name = identity_of_folder(model)
    assert len(bytes.fromhex(name)) == 16
    assert identity_of_folder(model) == name


def test_a_copy_is_the_same_model(model, copy):
    assert identity_of_folder(copy) == identity_of_folder(model)
    (copy / "README.md").write_text("where it came from")
    os.utime(copy / "model.safetensors", (0, 0))
    changes = {
        "_name_or_path": "/home/someone/model",
        "transformers_version": "4.57.0",
        "architectures": ["LlamaSCXForCausalLM"],
        "use_cache": False,
        "dtype": "bfloat16",
    }
    assert edit(copy, **changes) == identity_of_folder(model)


@pytest.mark.parametrize(
    "change",
    [
        {"num_hidden_layers": 1},
        {"hidden_size": 256},
        {"intermediate_size": 128},
        {"vocab_size": 256},
        {"num_attention_heads": 2},
        {"num_key_value_heads": 1},
        {"head_dim": 32},
        {"hidden_act": "gelu"},
        {"rms_norm_eps": 1e-3},
        {"rope_parameters": {"rope_type": "default", "rope_theta": 5e5}},
        {"rope_parameters": tiny_models.ROPE_VARIANTS["yarn"]},
        {"max_position_embeddings": 2048},
        {"model_type": "mistral", "sliding_window": 64},
        {"model_type": "qwen2"},
    ],
    ids=str,
)
@pytest.mark.parametrize("weights", [True, False])
def test_another_shape_is_another_model(change, weights, model, copy):
    if not weights:
        (copy / "model.safetensors").unlink()
    before = identity_of_folder(copy)
    assert edit(copy, **change) != before


def test_longrope_has_two_tables():
    def name(max_model_len):
        rope = {"rope_type": "longrope", "original_max_position_embeddings": 4096}
        return identity.identity_of(
            SimpleNamespace(
                model="org/model",
                revision=None,
                max_model_len=max_model_len,
                hf_text_config=SimpleNamespace(rope_parameters=rope),
            )
        )

    assert name(1024) == name(4096) != name(4097) == name(131072)


def test_other_weights_of_the_same_shape_are_another_model(model, copy):
    weights = load_file(copy / "model.safetensors")
    # As a merged adapter changes them: in some matrices of some layers, a little.
    matrix = weights["model.layers.1.self_attn.v_proj.weight"]
    matrix += torch.full_like(matrix, 1e-3)
    save_file(weights, copy / "model.safetensors", {"format": "pt"})
    size = (model / "model.safetensors").stat().st_size
    assert (copy / "model.safetensors").stat().st_size == size
    assert identity_of_folder(copy) != identity_of_folder(model)


def test_no_weights_are_another_model(model, copy):
    (copy / "model.safetensors").unlink()
    assert identity_of_folder(copy) != identity_of_folder(model)


@pytest.mark.parametrize("size", [0, 1, 4096, 4097, 1 << 20, (1 << 20) + 7])
def test_first_and_last_bytes_and_size_are_in_the_sample(size, copy):
    file = copy / "model.safetensors"
    names = set()
    contents = [bytes(size), bytes(size + 1)]
    if size:
        contents += [b"x" + bytes(size - 1), bytes(size - 1) + b"xx"]
    for content in contents:
        file.write_bytes(content)
        names.add(identity_of_folder(copy))
    assert len(names) == len(contents)


def test_a_change_in_a_hundredth_of_a_large_file_is_seen(copy):
    """Wherever that is: no gap between windows is so long."""
    file = copy / "model.safetensors"
    size, changed = 32 << 20, (32 << 20) // 100
    file.write_bytes(bytes(size))
    before = identity_of_folder(copy)
    for start in (0, 70_000, size // 2 + 5, size // 3, size - changed - 70_000):
        with file.open("r+b") as weights:
            for byte in (b"x", b"\0"):
                weights.seek(start)
                weights.write(byte * changed)
                weights.flush()
                assert (identity_of_folder(copy) != before) == (byte == b"x")


def test_all_of_a_small_file_is_read(copy):
    file = copy / "model.safetensors"
    content = file.read_bytes()
    before = identity_of_folder(copy)
    for position in range(0, len(content), len(content) // 50):
        file.write_bytes(content[:position] + b"?!" + content[position + 2 :])
        assert identity_of_folder(copy) != before


@pytest.fixture
def hub(model, tmp_path, monkeypatch):
    """A cache of the hub with one model in two commits, not all of it there yet."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    repository = tmp_path / "models--org--model"
    for commit in ("a" * 40, "b" * 40):
        folder = repository / "snapshots" / commit
        folder.mkdir(parents=True)
        shutil.copy(model / "config.json", folder)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text("a" * 40)
    return repository / "snapshots"


def test_a_model_of_the_hub_is_named_by_its_commit(hub, model):
    def name(path, revision=None):
        text_config = SimpleNamespace(hidden_size=64)
        return identity.identity_of(
            SimpleNamespace(model=path, revision=revision, hf_text_config=text_config)
        )

    main = name("org/model")
    assert main == name("org/model", "a" * 40) == name(str(hub / ("a" * 40)))
    # vLLM offline takes the folder of the snapshot; weights that come later, too.
    shutil.copy(model / "model.safetensors", hub / ("a" * 40))
    assert main == name("org/model") == name(str(hub / ("a" * 40)))
    others = [
        name("org/model", "b" * 40),
        name("org/unknown"),
        name("org/unknown", "v2"),
        name("s3://bucket/model"),
        name("s3://bucket/other"),
        name(str(model)),
    ]
    assert len({main, *others}) == 1 + len(others)
