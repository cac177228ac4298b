"""Configuration and key material."""

import copy
import os
import pickle

import pytest
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.kdf.hkdf import HKDF
from hypothesis import given
from hypothesis import strategies as st

from scx import keys
from scx.errors import SCXConfigError
from scx.keys import RootKey, SCXConfig, get_scx_config, scx_env_init

VARIABLES = (
    "SCX_ENC_LAYERS",
    "SCX_SECURE_DEVICE",
    "SCX_ENABLE_DEBUG",
    "SCX_KEY_FILE",
    "SCX_CODEC",
)


@pytest.fixture(autouse=True)
def clean_environment(monkeypatch):
    for variable in (*VARIABLES, "VLLM_PLUGINS"):
        # Set, then deleted: what a test writes is undone afterwards.
        monkeypatch.setenv(variable, "")
        monkeypatch.delenv(variable)
    monkeypatch.setattr(keys, "_config_of_process", None)


@pytest.fixture
def key_file(tmp_path):
    path = tmp_path / "key"
    path.touch(mode=0o600)
    path.write_bytes(bytes(range(32)))
    return path


def last_line(error):
    return str(error.value).splitlines()[-1]


def test_nothing_set_is_off():
    assert get_scx_config() == SCXConfig((), "cpu", False, None)
    assert not get_scx_config().enabled


@pytest.mark.parametrize(
    ("text", "layers"),
    [
        ("", ()),
        ("  ", ()),
        ("0", (0,)),
        ("0,27", (0, 27)),
        (" 27 , 0,0 ", (0, 27)),
        ("007", (7,)),
        ("all", "all"),
        (" ALL ", "all"),
    ],
)
def test_layers(text, layers, monkeypatch):
    monkeypatch.setenv("SCX_ENC_LAYERS", text)
    assert get_scx_config().enc_layers == layers


@given(st.sets(st.integers(0, 999), min_size=1))
def test_layers_of_any_set_round_trip(layers):
    config = keys.parse_config({"SCX_ENC_LAYERS": ",".join(map(str, layers))})
    assert config.enc_layers == config.layers_of(1000) == tuple(sorted(layers))


@given(st.text())
def test_any_text_is_layers_or_one_clear_line(text):
    message = None
    try:
        layers = keys.parse_config({"SCX_ENC_LAYERS": text}).enc_layers
    except SCXConfigError as error:
        message = str(error)
    if message is not None:
        assert message.startswith(f"SCX_ENC_LAYERS={text!r}: ")
        assert len(message.splitlines()) == 1
    else:
        assert (
            set(text) <= set("0123456789, alALlL") | set(" \t\n\r\v\f") or text.isspace()
        )
        assert layers == "all" or all(isinstance(layer, int) for layer in layers)


@pytest.mark.parametrize(
    ("variable", "value", "allowed"),
    [
        ("SCX_ENC_LAYERS", "first", "comma-separated"),
        ("SCX_ENC_LAYERS", "-1", "comma-separated"),
        ("SCX_ENC_LAYERS", "1.5", "comma-separated"),
        ("SCX_ENC_LAYERS", "0;27", "comma-separated"),
        ("SCX_ENC_LAYERS", "0 27", "comma-separated"),
        ("SCX_ENC_LAYERS", "0,,27", "comma-separated"),
        ("SCX_ENC_LAYERS", "0,", "comma-separated"),
        ("SCX_ENC_LAYERS", "0,all", "comma-separated"),
        ("SCX_ENC_LAYERS", "٣", "comma-separated"),
        ("SCX_ENC_LAYERS", "²", "comma-separated"),
        ("SCX_SECURE_DEVICE", "enclave", "a torch device"),
        ("SCX_SECURE_DEVICE", "", "a torch device"),
        ("SCX_SECURE_DEVICE", "cuda:99", "a torch device"),
        ("SCX_SECURE_DEVICE", "cpu:1", "a torch device"),
        ("SCX_SECURE_DEVICE", "meta", "a torch device"),
        ("SCX_ENABLE_DEBUG", "maybe", "one of 1, true"),
        ("SCX_ENABLE_DEBUG", "", "one of 1, true"),
        ("SCX_ENABLE_DEBUG", "2", "one of 1, true"),
        ("SCX_KEY_FILE", "/nowhere/key", "32 random bytes"),
        ("SCX_CODEC", "rot13", "one of permutation, affine"),
        ("SCX_KEY_FILE", "/", "32 random bytes"),
    ],
)
def test_malformed_values_name_variable_value_and_what_is_allowed(
    variable, value, allowed, monkeypatch
):
    monkeypatch.setenv(variable, value)
    with pytest.raises(SCXConfigError) as error:
        get_scx_config()
    assert last_line(error).startswith(f"{variable}={value!r}: ")
    assert allowed in last_line(error)


@pytest.mark.parametrize("word", ["true", "True", "1", "YES", "on"])
def test_debug_on(word, monkeypatch):
    monkeypatch.setenv("SCX_ENABLE_DEBUG", word)
    assert get_scx_config().enable_debug


@pytest.mark.parametrize("word", ["false", "0", "No", "OFF"])
def test_debug_off(word, monkeypatch):
    monkeypatch.setenv("SCX_ENABLE_DEBUG", word)
    assert not get_scx_config().enable_debug


def test_layers_beyond_the_model():
    assert SCXConfig("all", "cpu", False, None).layers_of(3) == (0, 1, 2)
    with pytest.raises(SCXConfigError, match=r"SCX_ENC_LAYERS='3,9': .* 0 to 2"):
        SCXConfig((0, 3, 9), "cpu", False, None).layers_of(3)


@pytest.mark.parametrize("layers", ["27, 0", [27, 0, 0], {0, 27}, iter((0, 27))])
def test_env_init_sets_the_variables(layers):
    scx_env_init(layers, "cpu", True)
    assert get_scx_config() == SCXConfig((0, 27), "cpu", True, None)
    assert os.environ["SCX_SECURE_DEVICE"] == "cpu"


@pytest.mark.parametrize("layers", [[-1], [0.5], [True], ["0"], [None]])
def test_env_init_refuses_other_items_and_sets_nothing(layers):
    with pytest.raises(SCXConfigError, match="enc_layers="):
        scx_env_init(layers, "cpu", False)
    assert "SCX_ENC_LAYERS" not in os.environ


def test_env_init_sets_nothing_where_any_value_is_malformed():
    with pytest.raises(SCXConfigError, match="SCX_ENABLE_DEBUG='maybe'"):
        scx_env_init("0", "cpu", "maybe")
    assert "SCX_ENC_LAYERS" not in os.environ


def test_env_init_refuses_a_filtered_plugin(monkeypatch):
    monkeypatch.setenv("VLLM_PLUGINS", "another")
    with pytest.raises(SCXConfigError, match=r"VLLM_PLUGINS='another'.*'scx'"):
        scx_env_init("0")
    monkeypatch.setenv("VLLM_PLUGINS", "another,scx")
    scx_env_init("0")


def test_env_init_refuses_a_package_that_is_not_an_entry_point(monkeypatch):
    monkeypatch.setattr(keys, "entry_points", lambda group: ())
    with pytest.raises(SCXConfigError, match="no entry point scx:init_vllm_plugin"):
        scx_env_init("0")


def test_env_init_refuses_another_setting_than_vllm_read():
    scx_env_init("0,1")
    keys.pin_config()
    scx_env_init([1, 0])
    with pytest.raises(SCXConfigError, match=r"SCX_ENC_LAYERS='2'.*then '0,1'"):
        scx_env_init("2")
    assert os.environ["SCX_ENC_LAYERS"] == "1,0"


def test_key_file_is_read(key_file, monkeypatch):
    monkeypatch.setenv("SCX_KEY_FILE", str(key_file))
    config = get_scx_config()
    assert config.key_file == key_file
    first, second = RootKey.load(config), RootKey.load(config)
    assert first.fingerprint == second.fingerprint
    assert first.derive("a", 8) == second.derive("a", 8) != first.derive("b", 8)


@pytest.mark.parametrize("mode", [0o640, 0o604, 0o660, 0o644])
def test_key_file_that_others_may_read(mode, key_file, monkeypatch):
    key_file.chmod(mode)
    monkeypatch.setenv("SCX_KEY_FILE", str(key_file))
    with pytest.raises(SCXConfigError, match=f"its mode is {mode:04o}, not 0600"):
        get_scx_config()


@pytest.mark.parametrize("size", [0, 31, 33, 64])
def test_key_file_of_wrong_size(size, key_file, monkeypatch):
    key_file.write_bytes(b"k" * size)
    monkeypatch.setenv("SCX_KEY_FILE", str(key_file))
    with pytest.raises(SCXConfigError) as error:
        get_scx_config()
    assert f"it has {size} bytes" in last_line(error)
    assert "kkkk" not in str(error.value)


def test_without_a_key_file_each_process_draws_its_own():
    config = SCXConfig((0,), "cpu", False, None)
    assert RootKey.load(config).fingerprint != RootKey.load(config).fingerprint


def test_a_stream_belongs_to_root_and_label():
    root = RootKey(bytes(range(32)))
    stream = root.stream("a", 100_000)
    assert stream == root.stream("a", 100_000)
    assert stream[:1000] == root.stream("a", 1000)
    for other in (root.stream("b", 1000), RootKey.draw().stream("a", 1000)):
        assert sum(x == y for x, y in zip(stream, other, strict=False)) < 30


def test_derivation_is_hkdf_sha256_of_rfc_5869():
    # Test case 3 of RFC 5869: no salt, no info. It fixes the library's meaning of
    # salt=None, on which `derive` relies.
    okm = HKDF(SHA256(), 42, salt=None, info=b"").derive(b"\x0b" * 22)
    assert okm.hex() == (
        "8da4e775a563c18f715f802a063c5a31b8a11f5c5ee1879ec3454e5f3c738d2d"
        "9d201395faa4b61a96c8"
    )
    expected = HKDF(SHA256(), 16, salt=None, info=b"scx-vllm v1 x").derive(b"\x01" * 32)
    assert RootKey(b"\x01" * 32).derive("x", 16) == expected


def test_a_root_key_shows_and_gives_away_nothing():
    secret = bytes(range(64, 96))
    root = RootKey(secret)
    assert repr(root) == f"<RootKey {root.fingerprint}>"
    assert secret.hex()[:16] not in repr(root)
    for give_away in (pickle.dumps, copy.copy, copy.deepcopy):
        with pytest.raises(TypeError, match="neither copied nor pickled"):
            give_away(root)
