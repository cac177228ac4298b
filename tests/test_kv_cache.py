"""What the accelerator holds: encoded caches, fresh row orders, no keys on disk.

These tests look at tensors and files, not at tokens, so that an engine that
ran plain would be seen.
"""

import math

import pytest
import torch

from lab.engines import engine, greedy, in_new_process, shut_down
from lab.root_keys import new_key_file, root_key
from scx.codecs.permutation import derive_feature_key
from tests.kv_caches import LAYERS, PROMPT, assert_encoded, caches

COMPILED = {"enforce_eager": False}


@pytest.mark.parametrize(
    "model", ["tiny_llama", pytest.param("tiny_qwen2", marks=pytest.mark.slow)]
)
def test_encoded_layers_alone_hold_an_encoded_cache(model, request):
    path = request.getfixturevalue(model)
    native = in_new_process(caches, path)
    settings = [
        ({0}, "permutation"),
        ({1, 3}, "affine"),
        (set(range(LAYERS)), "permutation"),
    ]
    for layers, codec in settings:
        env = {"SCX_ENC_LAYERS": ",".join(map(str, layers)), "SCX_CODEC": codec}
        assert_encoded(layers, in_new_process(caches, path, env=env), native)


def test_one_compile_cache_serves_all_settings(tiny_llama, tmp_path):
    native = None
    for layers in (set(), {0}, {0, 1}, set(), {2}):
        env = {
            "SCX_ENC_LAYERS": ",".join(map(str, layers)),
            "VLLM_CACHE_ROOT": str(tmp_path),
        }
        result = in_new_process(caches, tiny_llama, COMPILED, env=env)
        native = native or result
        assert_encoded(layers, result, native)
    assert list(tmp_path.rglob("torch_compile_cache/**/*")), "nothing was compiled"


def row_orders(model, compiled, repeats):
    """The order in which qkv_proj of layer 0 saw the same 8 tokens, run after run."""
    llm = engine(model, enforce_eager=not compiled, skip_tokenizer_init=True)
    seen = []

    def record(loaded):
        projection = loaded.model.layers[0].self_attn.qkv_proj
        projection.register_forward_pre_hook(lambda _, args: seen.append(args[0].clone()))

    llm.apply_model(record)
    for _ in range(repeats):
        greedy(llm, [PROMPT[:8]], max_tokens=1)
    shut_down(llm)
    reference = seen[0]
    return [tuple(torch.cdist(rows, reference).argmin(1).tolist()) for rows in seen]


@pytest.mark.parametrize(
    "compiled",
    [False, pytest.param(True, marks=pytest.mark.slow)],
    ids=["eager", "compiled"],
)
def test_each_step_draws_a_fresh_row_order(compiled, tiny_llama):
    repeats = 30
    env = {"SCX_ENC_LAYERS": "0"}
    orders = in_new_process(row_orders, tiny_llama, compiled, repeats, env=env)
    assert len(orders) == repeats
    assert all(sorted(order) == list(range(8)) for order in orders)
    # k repeats among 30 uniform draws of 8! orders: chance below (435 / 40320)^k / k!.
    allowed = 4
    assert (435 / math.factorial(8)) ** (allowed + 1) < 1e-9
    assert len(set(orders)) >= repeats - allowed


def test_no_key_is_in_the_compile_cache(tiny_llama, tmp_path):
    key_file = new_key_file(tmp_path / "key")
    cache = tmp_path / "cache"
    env = {
        "SCX_ENC_LAYERS": "0,1",
        "SCX_KEY_FILE": str(key_file),
        "VLLM_CACHE_ROOT": str(cache),
        "TORCHINDUCTOR_CACHE_DIR": str(cache / "inductor"),
    }
    in_new_process(caches, tiny_llama, COMPILED, env=env)

    root = root_key(key_file, tiny_llama)
    needles = set()
    for secret in (key_file.read_bytes(), root._secret):
        needles |= {secret, secret.hex().encode()}
    for layer in (0, 1):
        for key in derive_feature_key(root, layer, range(2), 64):
            numbers = key.tolist()[:12]
            needles |= {
                key[:12].numpy().tobytes(),
                key[:12].to(torch.int32).numpy().tobytes(),
                ", ".join(map(str, numbers)).encode(),
                ",".join(map(str, numbers)).encode(),
            }
    files = [file for file in cache.rglob("*") if file.is_file()]
    assert any("torch_compile_cache" in str(file) for file in files)

    def finds_a_key():
        return [
            f
            for f in cache.rglob("*")
            if f.is_file() and any(needle in f.read_bytes() for needle in needles)
        ]

    assert not finds_a_key()
    planted = cache / "planted"
    planted.write_bytes(b"key = [" + ", ".join(map(str, numbers)).encode() + b"]")
    assert finds_a_key() == [planted]
