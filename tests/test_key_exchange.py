"""KV that one engine stores and another reads: under the same key, or refused."""

import errno
import json
import multiprocessing
import os
import re
import shutil
import signal
from concurrent.futures import ThreadPoolExecutor
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file, save_file

from lab import tiny_models
from lab.engines import configure_each, engine, in_new_process
from lab.root_keys import identity, new_key_file, root_key
from lab.tiny_models import SHAPE
from scx.codecs.permutation import PermutationCodec
from scx.errors import SCXConfigError
from scx.keys import RootKey, get_scx_config
from scx.plugin import kv_store, plan
from scx.plugin.plan import EncodingPlan
from tests.kv_caches import TOLERANCE, cached_tokens
from tests.kv_stores import PROMPT, run_on_store, transfer

# Of PROMPT: two blocks of the CPU backend's 128 tokens. The rest is not stored.
STORED = 256
LAYERS = [0, 2]
RECORD = {"model": "abcd", "codec": "permutation", "layers": LAYERS}

SEALED = {"type": "sealed", "path": "/x"}


def tiered(*tiers):
    settings = {"spec_name": "TieringOffloadingSpec", "secondary_tiers": list(tiers)}
    return transfer(None, "OffloadingConnector", **settings)


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
    assert label == {"format": 2, "key": "aaaa"} | RECORD


@pytest.mark.parametrize(
    ("other", "texts"),
    [
        ({"key": "bbbb"}, ["KV of key 'aaaa'", "has key 'bbbb'", "SCX_KEY_FILE"]),
        ({"model": "ef01"}, ["KV of model 'abcd'", "has model 'ef01'", "one folder or"]),
        ({"codec": "affine"}, ["codec 'permutation'", "codec 'affine'", "SCX_CODEC"]),
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


@pytest.mark.parametrize(
    "label",
    [
        {"format": 1, "key": "aaaa", "codec": "permutation", "layers": LAYERS},
        {"format": 1},
        {"format": 1, "key": "aaaa"} | RECORD,
    ],
)
def test_the_format_of_before_is_refused(label, tmp_path):
    (tmp_path / "scx.json").write_text(json.dumps(label))
    with pytest.raises(SCXConfigError) as error:
        claim(tmp_path)
    assert str(error.value) == (
        f"shared_storage_path='{tmp_path}': it holds KV of format 1, and this engine has "
        "format 2: use the same version of this package, or use an empty folder"
    )


def test_files_without_a_label_are_refused_and_stay_unlabelled(tmp_path):
    (tmp_path / "0a1b").mkdir()
    for _ in range(2):
        with pytest.raises(SCXConfigError, match=r"it holds files but no scx\.json"):
            claim(tmp_path)


@pytest.mark.parametrize(
    "names",
    [
        ["scx.json.evil"],
        ["scx.json~"],
        ["scx.json."],
        ["scx.json.abcdefgh.draft.txt"],
        ["scx.json.abcdefg.draft"],
        ["scx.json.ABCDEFGH.draft"],
        ["scx.json.abcdefgh.draft/"],
        ["scx.json.abcdefgh.draft", "model.safetensors"],
    ],
)
def test_only_drafts_of_labels_leave_a_folder_empty(names, tmp_path):
    for name in names:
        (tmp_path / name).mkdir() if name.endswith("/") else (tmp_path / name).touch()
    with pytest.raises(SCXConfigError, match=r"it holds files but no scx\.json"):
        claim(tmp_path)
    assert not (tmp_path / "scx.json").exists()


@pytest.mark.parametrize("number", [errno.EPERM, errno.EOPNOTSUPP])
def test_a_file_system_without_hard_links_is_labelled_too(number, tmp_path, monkeypatch):
    def refuse(*_):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(Path, "hardlink_to", refuse)
    claim(tmp_path)
    claim(tmp_path)
    assert [file.name for file in tmp_path.iterdir()] == ["scx.json"]
    assert (tmp_path / "scx.json").stat().st_mode & 0o777 == 0o644
    with pytest.raises(SCXConfigError, match="key 'aaaa'"):
        claim(tmp_path, key="bbbb")


def claim_and_die(folder):
    """Killed between the draft and the label."""
    Path.hardlink_to = lambda *paths: os.kill(os.getpid(), signal.SIGKILL)
    claim(folder)


def test_the_draft_of_an_engine_that_was_killed_is_no_kv(tmp_path):
    dying = multiprocessing.get_context("fork").Process(
        target=claim_and_die, args=(tmp_path,)
    )
    dying.start()
    dying.join()
    assert dying.exitcode == -signal.SIGKILL
    (draft,) = os.listdir(tmp_path)
    assert draft != "scx.json"
    claim(tmp_path)
    assert sorted(os.listdir(tmp_path)) == ["scx.json", draft]


LABEL = {"format": 2, "key": "aaaa"} | RECORD


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"{",
        b"[1]",
        b"7",
        b"null",
        b"NaN",
        b"\xff",
        b"[" * 200_000,
        b'{"format":' * 5_000,
        b'{"format": ' + b"1" * 5_000 + b"}",
        json.dumps(LABEL).encode("utf-16"),
        json.dumps(LABEL).encode() + b" " * (1 << 16),
        json.dumps(list(LABEL.items())).encode(),
        *(
            json.dumps(LABEL | change).encode()
            for change in (
                {"format": True},
                {"format": 2.0},
                {"format": "2"},
                {"format": float("nan")},
                {"key": None},
                {"key": ["aaaa"]},
                {"model": 1},
                {"codec": {}},
                {"layers": None},
                {"layers": "0,2"},
                {"layers": [0, 2.0]},
                {"layers": [False, 2]},
                {"layers": [[0], 2]},
                {"more": 1},
            )
        ),
        *(
            json.dumps({k: v for k, v in LABEL.items() if k != name}).encode()
            for name in LABEL
        ),
    ],
    ids=lambda content: repr(content[:60]),
)
def test_what_is_no_label_is_refused(content, tmp_path):
    (tmp_path / "scx.json").write_bytes(content)
    with pytest.raises(SCXConfigError) as error:
        claim(tmp_path)
    assert str(error.value) == (
        f"shared_storage_path='{tmp_path}': its scx.json is not a label of this package: "
        "use an empty folder"
    )


@pytest.mark.parametrize("kind", ["link", "dangling", "folder", "fifo"])
def test_a_label_that_is_no_file_is_refused_at_once(kind, tmp_path):
    claim(tmp_path / "labelled")
    folder = tmp_path / "kv"
    folder.mkdir()
    label = folder / "scx.json"
    if kind == "folder":
        label.mkdir()
    elif kind == "fifo":
        os.mkfifo(label)
    else:
        target = "labelled/scx.json" if kind == "link" else "none"
        label.symlink_to(tmp_path / target)
    with pytest.raises(SCXConfigError) as error:
        claim(folder)
    (line,) = str(error.value).splitlines()
    assert "its scx.json is not a label of this package that can be read (" in line


@pytest.mark.parametrize("name", ["model", "key", "codec"])
def test_what_a_label_says_is_shown_on_one_short_line(name, tmp_path):
    forged = "x\n2026-11-25 ERROR forged \x1b[31m\u2028" + "y" * 10_000
    (tmp_path / "scx.json").write_text(json.dumps(LABEL | {name: forged}))
    with pytest.raises(SCXConfigError) as error:
        claim(tmp_path)
    message = str(error.value)
    assert message.isprintable()
    assert f"it holds KV of {name} 'x\\n2026-11-25 ERROR forged \\x1b[31m" in message
    assert len(message) < 600


def test_a_long_list_of_layers_is_shown_in_part(tmp_path):
    (tmp_path / "scx.json").write_text(json.dumps(LABEL | {"layers": [10**100] * 500}))
    with pytest.raises(SCXConfigError, match=r"layers \[1000.*\.\.\., and this") as error:
        claim(tmp_path)
    assert len(str(error.value)) < 600


def test_the_label_is_on_the_disk_before_an_engine_starts(tmp_path, monkeypatch):
    real, synced = os.fsync, []

    def fsync(descriptor):
        synced.append(os.readlink(f"/proc/self/fd/{descriptor}"))
        # What is synced first is whole.
        if len(synced) == 1:
            draft = Path(synced[0])
            assert json.loads(draft.read_text()) == LABEL
            assert not (tmp_path / "scx.json").exists()
        else:
            assert (tmp_path / "scx.json").exists()
        real(descriptor)

    monkeypatch.setattr(os, "fsync", fsync)
    claim(tmp_path)
    draft, folder = synced
    assert folder == str(tmp_path)
    assert re.fullmatch(r"scx\.json\.[a-z0-9_]{8}\.draft", os.path.basename(draft))


def test_who_finds_its_own_label_writes_nothing(tmp_path, monkeypatch):
    claim(tmp_path)
    monkeypatch.setattr(kv_store.tempfile, "NamedTemporaryFile", None)
    claim(tmp_path)


@pytest.mark.parametrize("path", ["/proc/nowhere", "/dev/null", "nul\0l"])
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
    assert all(f"KV of key '{winner}'," in error for error in errors if error)
    assert [file.name for file in tmp_path.iterdir()] == ["scx.json"]


# A folder that is labelled, and an engine with SCX off.


def off(connector="ExampleConnector", offloading=None, **settings):
    """What `require_unlabelled` says to such an engine, None where it is let in."""
    transfer = connector and SimpleNamespace(
        kv_connector=connector, kv_connector_extra_config=settings
    )
    config = SimpleNamespace(
        cache_config=SimpleNamespace(kv_offloading_size=offloading),
        kv_transfer_config=transfer,
    )
    try:
        kv_store.require_unlabelled(config)
    except SCXConfigError as error:
        return str(error)


def test_any_setting_that_names_a_labelled_folder_is_refused(tmp_path, monkeypatch):
    labelled, other = tmp_path / "labelled", tmp_path / "other"
    claim(labelled)
    claim(other)
    (other / "scx.json").write_text("whatever it says")
    nested = {"connectors": [{"kv_connector_extra_config": {"path": [str(labelled)]}}]}
    monkeypatch.chdir(tmp_path)
    cases = [
        off(shared_storage_path=str(labelled)),
        off(shared_storage_path=f"{labelled}/../labelled/"),
        off(shared_storage_path="labelled"),
        off(shared_storage_path=str(other)),
        off("SharedStorageConnector", shared_storage_path=labelled),
        off("LMCacheConnectorV1", anything=f"file://{labelled}"),
        off("MultiConnector", **nested),
        off("OffloadingConnector", spec_name="TieringOffloadingSpec", tiers=(labelled,)),
    ]
    for message in cases:
        assert len(message.splitlines()) == 1
        assert "whose scx.json says that its KV is encoded" in message
        assert "SCX_ENC_LAYERS is empty" in message
    assert str(labelled) in cases[0]


def test_the_folder_that_vllm_takes_without_a_setting_counts(tmp_path, monkeypatch):
    (vllm,) = find_spec("vllm").submodule_search_locations
    connectors = Path(vllm) / "distributed" / "kv_transfer" / "kv_connector" / "v1"
    source = (connectors / "example_connector.py").read_text()
    assert f'"{kv_store.FOLDER}", "{kv_store.DEFAULT_FOLDER}"' in source
    monkeypatch.setattr(kv_store, "DEFAULT_FOLDER", str(tmp_path))
    assert off() is None
    claim(tmp_path)
    assert f"given the folder '{tmp_path}'" in off()
    assert off(shared_storage_path=str(tmp_path / "own")) is None
    assert off("NixlConnector") is None


def test_other_folders_and_settings_are_let_be(tmp_path):
    (tmp_path / "plain").mkdir()
    assert off(None) is None
    assert off(None, offloading=1.0) is None
    for value in (str(tmp_path / "plain"), "", "\0", "x" * 5000, 7, None, [{}], True):
        assert off(shared_storage_path=value, other=value) is None


@pytest.fixture(scope="module")
def outcomes_off(tiny_llama, store, tmp_path_factory):
    new = tmp_path_factory.mktemp("off")
    runs = [
        ({"model": str(tiny_llama)} | transfer(folder), {}) for folder in (store[0], new)
    ]
    # A key file that is not there: an engine with SCX off does not look for it.
    env = {"SCX_ENC_LAYERS": "", "SCX_KEY_FILE": str(new / "no key")}
    return in_new_process(configure_each, runs, env=env), new


def test_an_engine_with_scx_off_is_not_let_into_a_labelled_folder(outcomes_off, store):
    (labelled, unlabelled), new = outcomes_off
    kind, message = labelled
    assert kind == "SCXConfigError", message
    assert message.startswith(
        f"ExampleConnector is given the folder '{store[0]}', whose scx.json says"
    )
    assert unlabelled == ("configured", None)
    assert os.listdir(new) == []


# Which connectors are allowed, before weights load.


@pytest.fixture(scope="module")
def store(tiny_llama, tmp_path_factory):
    """A folder that is labelled for the key file, and a key file of another key."""
    root = tmp_path_factory.mktemp("store")
    keys = new_key_file(root / "key"), new_key_file(root / "other")
    key = root_key(keys[0], tiny_llama).fingerprint
    claim(root / "kv", key, model=identity(tiny_llama))
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
        "sealed tier": tiered(SEALED),
        "sealed tier of kv_offloading_size": {"kv_offloading_size": 1.0} | tiered(SEALED),
        "sealed tier and another": tiered(SEALED, {"type": "fs", "root_dir": "/x"}),
        "sealed tier elsewhere": transfer(
            None,
            "SimpleCPUOffloadConnector",
            spec_name="TieringOffloadingSpec",
            secondary_tiers=[SEALED],
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
    # The same model in another folder, and what fine-tuning could make of it.
    copied = shutil.copytree(tiny_llama, new.parent / "a copy")
    tuned = tiny_models.save(new.parent / "tuned", "LlamaForCausalLM", head_dim=64)
    with torch.no_grad():
        weights = load_file(tuned / "model.safetensors")
        weights["model.layers.0.self_attn.v_proj.weight"][0] += 0.01
        save_file(weights, tuned / "model.safetensors", {"format": "pt"})
    cases["copied model"] = transfer(new) | {"model": str(copied)}
    cases["tuned model"] = transfer(new) | {"model": str(tuned)}
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


@pytest.mark.parametrize(
    "case",
    [
        "new folder",
        "copied model",
        "memory",
        "offload",
        "sealed tier",
        "sealed tier of kv_offloading_size",
    ],
)
def test_what_is_labelled_or_dies_with_the_engine_is_allowed(
    case, outcomes, store, tiny_llama
):
    results, new = outcomes
    assert results[case][0] == "configured", results[case]
    label = json.loads((new / "scx.json").read_text())
    assert label == {
        "format": 2,
        "model": identity(tiny_llama),
        "key": root_key(store[2], tiny_llama).fingerprint,
        "codec": "permutation",
        "layers": LAYERS,
    }


@pytest.mark.parametrize(
    ("case", "texts"),
    [
        ("network", ["the KV connector NixlConnector", "OffloadingConnector"]),
        ("several", ["the KV connector MultiConnector", "ExampleConnector (in a"]),
        ("foreign", ["the KV connector ExampleConnector", "vLLM's own"]),
        ("offload to a server", ["the KV connector lmcache"]),
        ("disk tier", ["spec_name='TieringOffloadingSpec'", "'CPUOffloadingSpec'"]),
        ("sealed tier and another", ["spec_name='TieringOffloadingSpec'", "'sealed'"]),
        ("sealed tier elsewhere", ["spec_name='TieringOffloadingSpec'"]),
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


def test_a_store_of_another_key_is_refused_by_fingerprint(outcomes, store, tiny_llama):
    folder = store[0]
    key, other = (root_key(file, tiny_llama).fingerprint for file in store[1:])
    kind, message = outcomes[0]["other key"]
    assert kind == "SCXConfigError"
    assert message == (
        f"shared_storage_path='{folder}': it holds KV of key '{key}', and "
        f"this engine has key '{other}': use the same key in SCX_KEY_FILE, "
        "or use an empty folder"
    )


def test_a_store_of_another_model_is_refused(outcomes, tiny_llama):
    results, new = outcomes
    kind, message = results["tuned model"]
    assert kind == "SCXConfigError"
    holds = f"it holds KV of model '{identity(tiny_llama)}', and this engine has model '"
    assert message.startswith(f"shared_storage_path='{new}': {holds}")


def test_a_key_that_no_store_needs_is_not_read_to_configure(tiny_llama, tmp_path):
    """What the file is can be seen without that, and is refused before the engine."""
    zeros = new_key_file(tmp_path / "zeros", bytes(32))
    run = {"model": str(tiny_llama)}
    runs = [(run, {}), (run | transfer(tmp_path / "kv"), {})]
    env = {"SCX_ENC_LAYERS": "0,2", "SCX_KEY_FILE": str(zeros)}
    without, (kind, message) = in_new_process(configure_each, runs, env=env)
    assert without[0] == "configured", without
    assert without[1]["model"] == identity(tiny_llama)
    assert kind == "SCXConfigError"
    assert message.startswith(f"SCX_KEY_FILE='{zeros}': its bytes are not random")

    env["SCX_KEY_FILE"] = str(tmp_path / "no key")
    ((kind, message),) = in_new_process(configure_each, [(run, {})], env=env)
    assert kind == "SCXConfigError"
    assert message.startswith(f"SCX_KEY_FILE='{tmp_path}/no key': No such file")


def test_a_worker_has_the_key_of_the_model_that_was_recorded(tmp_path, monkeypatch):
    """Its own folder is not asked, and it may not draw a key where others read one."""
    key_file = new_key_file(tmp_path / "key")
    monkeypatch.setenv("SCX_ENC_LAYERS", "0,2")
    monkeypatch.setenv("SCX_KEY_FILE", str(key_file))
    from vllm.model_executor.models import ModelRegistry

    model_config = SimpleNamespace(
        hf_config=SimpleNamespace(architectures=["LlamaForCausalLM"]),
        hf_text_config=SimpleNamespace(num_hidden_layers=4),
        runner_type="generate",
        convert_type="none",
        dtype=torch.float32,
        max_model_len=8,
        registry=ModelRegistry,
    )
    record = plan._shared(get_scx_config(), model_config) | {"model": "abcd"}
    vllm_config = SimpleNamespace(
        additional_config={"scx": record},
        compilation_config=SimpleNamespace(cudagraph_capture_sizes=None),
        model_config=model_config,
        scheduler_config=SimpleNamespace(max_num_batched_tokens=8),
    )
    assert EncodingPlan.read(vllm_config).layers == (0, 2)
    expected = RootKey.load(get_scx_config()).for_model("abcd").fingerprint
    assert EncodingPlan.read(vllm_config).root_key().fingerprint == expected
    monkeypatch.delenv("SCX_KEY_FILE")
    with pytest.raises(SCXConfigError, match="key_file=False in this worker"):
        EncodingPlan.read(vllm_config)


# The exchange, between engines of different processes.


def stored(folder):
    """Keys and values (128, M x D) of the first stored block, by layer."""
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
    # One file per layer is read, and what it holds is not computed again.
    assert second[1:] == spoilt[1:] == (computed - STORED, SHAPE["num_hidden_layers"])
    assert native[0] == first[0] == second[0]
    assert spoilt[0] != native[0]

    root = root_key(key_file, tiny_llama)
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
    from scx.plugin import register

    configure = register.configure

    def configure_and_change(vllm_config):
        configure(vllm_config)
        key_file = os.environ["SCX_KEY_FILE"]
        if change == "replace":
            with open(key_file, "wb") as file:
                file.write(os.urandom(32))
        else:
            os.unlink(key_file)

    register.configure = configure_and_change
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


def test_a_sealed_tier_is_told_what_its_blocks_are_with_encoding_off_too(
    tmp_path, tiny_llama, monkeypatch
):
    def config():
        transfer = tiered(SEALED | {"path": str(tmp_path)})["kv_transfer_config"]
        return SimpleNamespace(
            kv_transfer_config=SimpleNamespace(**transfer),
            model_config=SimpleNamespace(
                model=tiny_llama, revision=None, dtype="bf16", hf_text_config=None
            ),
            cache_config=SimpleNamespace(cache_dtype="auto"),
        )

    monkeypatch.delenv("SCX_KEY_FILE", raising=False)
    with pytest.raises(SCXConfigError, match="SCX_KEY_FILE"):
        kv_store.prepare_tiers(config(), get_scx_config(), None)
    monkeypatch.setenv("SCX_KEY_FILE", str(new_key_file(tmp_path / "key")))
    monkeypatch.setattr(kv_store, "identity_of", lambda _: "abcd")
    told = config()
    kv_store.prepare_tiers(told, get_scx_config(), None)
    (tier,) = told.kv_transfer_config.kv_connector_extra_config["secondary_tiers"]
    assert tier["module_path"] == "scx.sealed"
    assert tier["facts"] == {
        "model": "abcd",
        "dtype": "bf16",
        "cache_dtype": "auto",
        "encoding": None,
    }
