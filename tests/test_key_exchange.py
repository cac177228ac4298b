"""KV that one engine stores and another reads: under the same key, or refused."""

import json
import os
import secrets
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import pytest
import torch

from scx import kv_store
from scx.codecs.permutation import PermutationCodec
from scx.errors import SCXConfigError
from scx.keys import RootKey, SCXConfig
from tests.engines import engine, greedy, in_new_process, shut_down, watch_rows
from tests.test_kv_cache import TOLERANCE, cached_tokens
from tests.test_refusals import configure_each
from tests.tiny_models import PROMPTS, SHAPE

# Two blocks of the CPU backend's 128 tokens are stored, and the rest is not.
PROMPT = PROMPTS[-1]
STORED = 256
LAYERS = [0, 2]
RECORD = {"codec": "permutation", "layers": LAYERS}


def transfer(folder, connector="ExampleConnector", **settings):
    """Engine arguments; without a folder there is no such setting."""
    if folder is not None:
        settings |= {kv_store.FOLDER: str(folder)}
    return {
        "kv_transfer_config": {
            "kv_connector": connector,
            "kv_role": "kv_both",
            "kv_connector_extra_config": settings,
        }
    }


def new_key_file(path):
    path.touch(mode=0o600)
    path.write_bytes(secrets.token_bytes(32))
    return path


def fingerprint(key_file):
    return RootKey.load(SCXConfig((0,), "cpu", False, key_file)).fingerprint


# The label itself, without vLLM.


def config_with(folder):
    settings = SimpleNamespace(**transfer(folder)["kv_transfer_config"])
    return SimpleNamespace(
        cache_config=SimpleNamespace(kv_offloading_size=None), kv_transfer_config=settings
    )


def claim(folder, key="aaaa", **record):
    kv_store.claim(config_with(folder), key, RECORD | record)


def test_the_first_engine_labels_an_empty_folder_and_others_compare(tmp_path):
    folder = tmp_path / "new" / "store"
    claim(folder)
    claim(folder)
    assert [file.name for file in folder.iterdir()] == ["scx.json"]
    label = json.loads((folder / "scx.json").read_text())
    assert label == {"format": 1, "key": "aaaa"} | RECORD


@pytest.mark.parametrize(
    ("other", "texts"),
    [
        ({"key": "bbbb"}, ["KV of key aaaa", "this engine has key bbbb", "SCX_KEY_FILE"]),
        ({"codec": "affine"}, ["codec permutation", "codec affine", "SCX_CODEC"]),
        ({"layers": [0]}, ["layers [0, 2]", "layers [0]", "SCX_ENC_LAYERS"]),
    ],
)
def test_a_label_that_differs_is_refused_in_one_line(other, texts, tmp_path):
    claim(tmp_path)
    with pytest.raises(SCXConfigError) as error:
        claim(tmp_path, **other)
    message = str(error.value)
    assert len(message.splitlines()) == 1
    for text in (f"shared_storage_path='{tmp_path}'", *texts, "an empty folder"):
        assert text in message


def test_another_format_is_refused(tmp_path, monkeypatch):
    claim(tmp_path)
    monkeypatch.setattr(kv_store, "FORMAT", 2)
    with pytest.raises(SCXConfigError, match="format 1, and this engine has format 2"):
        claim(tmp_path)


def test_files_without_a_label_are_refused_and_stay_unlabelled(tmp_path):
    (tmp_path / "0a1b").mkdir()
    for _ in range(2):
        with pytest.raises(SCXConfigError, match=r"it holds files but no scx\.json"):
            claim(tmp_path)


@pytest.mark.parametrize("text", ["", "{", "[1]", "7", "\udcff"])
def test_what_is_no_label_is_refused(text, tmp_path):
    (tmp_path / "scx.json").write_text(text, errors="surrogateescape")
    with pytest.raises(SCXConfigError, match="no label of this package"):
        claim(tmp_path)


@pytest.mark.parametrize("path", ["/proc/nowhere", "/dev/null"])
def test_a_folder_that_cannot_be_written_is_refused(path):
    with pytest.raises(SCXConfigError, match="allowed is a folder that can be written"):
        claim(path)


def test_of_engines_that_start_together_one_wins(tmp_path):
    def attempt(key):
        try:
            claim(tmp_path, key)
        except SCXConfigError as error:
            return str(error)

    keys = [f"key{i}" for i in range(16)]
    with ThreadPoolExecutor(len(keys)) as pool:
        errors = list(pool.map(attempt, keys))
    (winner,) = [key for key, error in zip(keys, errors, strict=True) if error is None]
    assert json.loads((tmp_path / "scx.json").read_text())["key"] == winner
    assert all(f"KV of key {winner}," in error for error in errors if error)
    assert [file.name for file in tmp_path.iterdir()] == ["scx.json"]


# Which connectors are allowed, before weights load.


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    """A folder that is labelled for the key file, and a key file of another key."""
    root = tmp_path_factory.mktemp("store")
    keys = new_key_file(root / "key"), new_key_file(root / "other")
    claim(root / "kv", fingerprint(keys[0]))
    return root / "kv", *keys


@pytest.fixture(scope="module")
def outcomes(tiny_llama, store, tmp_path_factory):
    folder, _, other = store
    new = tmp_path_factory.mktemp("new")
    cases = {
        "other key": transfer(folder),
        "new folder": transfer(new),
        "no folder": transfer(None),
        "network": transfer(None, "NixlConnector"),
        "several": transfer(None, "MultiConnector", connectors=[]),
        "foreign": transfer(new, "ExampleConnector"),
        "disk tier": transfer(
            None, "OffloadingConnector", spec_name="TieringOffloadingSpec"
        ),
        "disk": transfer(
            None, "SimpleCPUOffloadConnector", kv_offload_backend="disk", disk_path="/x"
        ),
        "memory": transfer(None, "OffloadingConnector", cpu_bytes_to_use=1 << 20),
        "offload": {"kv_offloading_size": 1.0},
        "offload to a server": {
            "kv_offloading_size": 1.0,
            "kv_offloading_backend": "lmcache",
        },
    }
    cases["foreign"]["kv_transfer_config"]["kv_connector_module_path"] = "somewhere"
    # Set though a folder is not asked for: it must not become a way around the rule.
    cases["offload with a disk tier"] = cases["offload"] | {
        "kv_transfer_config": {
            "kv_connector_extra_config": {"kv_offload_backend": "disk"}
        }
    }
    runs = [({"model": str(tiny_llama)} | case, {}) for case in cases.values()]
    env = {"SCX_ENC_LAYERS": "0,2", "SCX_KEY_FILE": str(other)}
    results = in_new_process(configure_each, runs, env=env)
    return dict(zip(cases, results, strict=True)), new


@pytest.mark.parametrize("case", ["new folder", "memory", "offload"])
def test_what_is_labelled_or_dies_with_the_engine_is_allowed(case, outcomes, store):
    results, new = outcomes
    assert results[case][0] == "configured", results[case]
    label = json.loads((new / "scx.json").read_text())
    assert label["key"] == fingerprint(store[2])


@pytest.mark.parametrize(
    ("case", "texts"),
    [
        ("network", ["the KV connector NixlConnector", "OffloadingConnector"]),
        ("several", ["the KV connector MultiConnector", "ExampleConnector (in a"]),
        ("foreign", ["the KV connector ExampleConnector", "vLLM's own"]),
        ("offload to a server", ["the KV connector lmcache"]),
        ("disk tier", ["spec_name='TieringOffloadingSpec'", "'CPUOffloadingSpec'"]),
        ("disk", ["kv_offload_backend='disk'", "use 'cpu'"]),
        ("offload with a disk tier", ["kv_offload_backend='disk'", "use 'cpu'"]),
        ("no folder", ["set shared_storage_path in kv_connector_extra_config"]),
    ],
)
def test_other_connectors_are_refused_in_one_line(case, texts, outcomes):
    kind, message = outcomes[0][case]
    assert kind == "SCXUnsupportedError", message
    assert len(message.splitlines()) == 1
    for text in texts:
        assert text in message


def test_a_store_of_another_key_is_refused_by_fingerprint(outcomes, store):
    folder, key, other = store
    kind, message = outcomes[0]["other key"]
    assert kind == "SCXConfigError"
    assert message == (
        f"shared_storage_path='{folder}': it holds KV of key {fingerprint(key)}, and "
        f"this engine has key {fingerprint(other)}: set SCX_KEY_FILE with that key "
        "alike, or use an empty folder"
    )


# The exchange, between engines of different processes.


def run_on_store(model, folder, spoil=False):
    """Tokens for PROMPT, rows that layer 0 projected, files read from the store.

    With `spoil` all that is stored is set to zero after that, and a second triple
    says what the engine then does.
    """
    import safetensors.torch

    load, files = safetensors.torch.load_file, []

    def counted(name, *rest, **named):
        files.append(name)
        return load(name, *rest, **named)

    safetensors.torch.load_file = counted
    llm = engine(model, skip_tokenizer_init=True, **transfer(folder))
    rows = watch_rows(llm)
    results = []
    for _ in range(1 + spoil):
        (tokens,) = greedy(llm, [PROMPT])
        results.append((tokens, sum(rows), len(files)))
        rows.clear()
        files.clear()
        if spoil:
            for file in folder.rglob("*.safetensors"):
                kv = load(file)["kv_cache"]
                safetensors.torch.save_file({"kv_cache": torch.zeros_like(kv)}, file)
    shut_down(llm)
    return results


def stored(folder):
    """Keys and values (128, M x D) of the first stored block, by layer."""
    from safetensors.torch import load_file

    result = []
    for layer in range(SHAPE["num_hidden_layers"]):
        (file,) = folder.rglob(f"model.layers.{layer}.self_attn.attn.safetensors")
        kv = load_file(file)["kv_cache"]
        block = kv[: STORED // 2].transpose(0, 1)[None].contiguous()
        result.append(cached_tokens(torch.cat([block * 0, block]), STORED // 2))
    return result


@pytest.mark.skipif(
    torch.cuda.is_available(), reason="test_gpu_features.py has that for a GPU"
)
def test_a_second_process_reads_what_a_first_one_stored(tiny_llama, tmp_path):
    key_file = new_key_file(tmp_path / "key")
    plain, encoded = tmp_path / "plain", tmp_path / "encoded"
    plain.mkdir()
    env = {"SCX_ENC_LAYERS": "0,2", "SCX_KEY_FILE": str(key_file)}
    (native,) = in_new_process(run_on_store, tiny_llama, plain)
    (first,) = in_new_process(run_on_store, tiny_llama, encoded, env=env)
    held = stored(encoded)
    second, spoilt = in_new_process(run_on_store, tiny_llama, encoded, True, env=env)

    computed = len(PROMPT) + len(native[0]) - 1
    assert native[1:] == first[1:] == (computed, 0)
    # One file a layer is read, and what it holds is not computed again.
    assert second[1:] == spoilt[1:] == (computed - STORED, SHAPE["num_hidden_layers"])
    assert native[0] == first[0] == second[0]
    assert spoilt[0] != native[0]

    root = RootKey.load(SCXConfig((0, 2), "cpu", False, key_file))
    for layer, (ours, theirs) in enumerate(zip(held, stored(plain), strict=True)):
        k, v = ours
        if layer in LAYERS:
            assert (k - theirs[0]).abs().max() > 0.1
            features = PermutationCodec.derive(root, layer, range(2), 64)
            k, v = features.decode_keys(k), features.decode_values(v)
        torch.testing.assert_close(k, theirs[0], **TOLERANCE)
        torch.testing.assert_close(v, theirs[1], **TOLERANCE)


def build_after(model, folder, change):
    """Build an engine whose key file changes once the engine is configured."""
    from scx import engine as scx_engine

    configure = scx_engine.configure

    def configure_and_change(vllm_config):
        configure(vllm_config)
        key_file = os.environ["SCX_KEY_FILE"]
        if change == "replace":
            with open(key_file, "wb") as file:
                file.write(bytes(32))
        else:
            os.unlink(key_file)

    scx_engine.configure = configure_and_change
    try:
        engine(model, skip_tokenizer_init=True, **transfer(folder))
    except Exception as error:
        return type(error).__name__, str(error)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("change", "text"),
    [
        ("replace", "and this engine has key"),
        ("remove", "No such file or directory; allowed is a regular file of 32 random"),
    ],
)
def test_a_worker_compares_the_key_that_it_reads_itself(
    change, text, tiny_llama, tmp_path
):
    key_file = new_key_file(tmp_path / "key")
    env = {"SCX_ENC_LAYERS": "0,2", "SCX_KEY_FILE": str(key_file)}
    kind, message = in_new_process(
        build_after, tiny_llama, tmp_path / "kv", change, env=env
    )
    assert kind == "SCXConfigError"
    assert text in message
