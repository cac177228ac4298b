"""Configuration and key material."""

import copy
import hmac
import os
import pickle
import socket
import struct
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
import torch
from cryptography.hazmat.primitives.ciphers import Cipher
from cryptography.hazmat.primitives.ciphers.algorithms import ChaCha20
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.kdf.hkdf import HKDF
from hypothesis import given
from hypothesis import strategies as st

from lab.root_keys import new_key_file
from scx import keys
from scx.codecs.permutation import derive_feature_key
from scx.errors import SCXConfigError
from scx.keys import RootKey, SCXConfig, get_scx_config, scx_env_init


@pytest.fixture(autouse=True)
def clean_environment(monkeypatch):
    for variable in (*keys.VARIABLES, "VLLM_PLUGINS"):
        # Set, then deleted: what a test writes is undone afterwards.
        monkeypatch.setenv(variable, "")
        monkeypatch.delenv(variable)
    monkeypatch.setattr(keys, "_config_of_process", None)


@pytest.fixture
def key_file(tmp_path):
    return new_key_file(tmp_path / "key", bytes(range(32)))


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
        ("SCX_CODEC", "rot13", "one of permutation, affine"),
        ("SCX_HOST_THREADS", "0", "a whole number from 1"),
        ("SCX_HOST_THREADS", "-2", "a whole number from 1"),
        ("SCX_HOST_THREADS", "four", "a whole number from 1"),
        ("SCX_HOST_THREADS", "1000", "a whole number from 1"),
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


@pytest.mark.parametrize(("text", "threads"), [("", None), (" 4 ", 4), ("16", 16)])
def test_threads_by_hand(text, threads, monkeypatch):
    monkeypatch.setenv("SCX_HOST_THREADS", text)
    assert get_scx_config().host_threads == threads


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


@pytest.mark.parametrize(
    ("variable", "before", "after"),
    [
        ("SCX_ENC_LAYERS", "0,1", "0"),
        ("SCX_SECURE_DEVICE", "cpu", "cpu:0"),
        ("SCX_ENABLE_DEBUG", "false", "true"),
        ("SCX_CODEC", "permutation", "affine"),
        ("SCX_KEY_FILE", "", "/keys/other"),
        ("SCX_HOST_THREADS", "", "4"),
    ],
)
def test_a_change_is_refused_by_variable(variable, before, after, monkeypatch):
    monkeypatch.setenv("SCX_ENC_LAYERS", "0,1")
    keys.pin_config()
    # Another spelling of the same is no change.
    monkeypatch.setenv("SCX_ENC_LAYERS", " 1,0")
    keys.require_unchanged(get_scx_config())
    monkeypatch.setenv(variable, after)
    with pytest.raises(SCXConfigError) as error:
        keys.require_unchanged(get_scx_config())
    assert last_line(error).startswith(f"{variable}={after!r} (then {before!r}): ")
    assert sum(name in str(error.value) for name in keys.VARIABLES) == 1


def test_a_setting_that_was_malformed_is_refused_later(monkeypatch):
    monkeypatch.setenv("SCX_ENC_LAYERS", "x")
    with pytest.raises(SCXConfigError):
        keys.pin_config()
    monkeypatch.setenv("SCX_ENC_LAYERS", "0")
    with pytest.raises(SCXConfigError, match=r"were malformed when .*a new process"):
        keys.require_unchanged(get_scx_config())


@pytest.mark.parametrize(
    ("name", "nearest"),
    [
        ("SCX_ENC_LAYER", "SCX_ENC_LAYERS"),
        ("SCX_KEYFILE", "SCX_KEY_FILE"),
        ("SCX_KEY", "SCX_KEY_FILE"),
        ("SCX_DEBUG", "SCX_ENABLE_DEBUG"),
        ("scx_enc_layers", "SCX_ENC_LAYERS"),
        ("SCX_CODEC ", "SCX_CODEC"),
        ("Scx_Secure_Device", "SCX_SECURE_DEVICE"),
        ("SCX_", ""),
    ],
)
@pytest.mark.parametrize("layers", ["", "0"])
def test_a_name_that_nobody_reads_is_refused(name, nearest, layers, monkeypatch):
    monkeypatch.setenv("SCX_ENC_LAYERS", layers)
    monkeypatch.setenv(name, "5ec7e7")
    for read in (get_scx_config, keys.pin_config, lambda: scx_env_init("0")):
        with pytest.raises(SCXConfigError) as error:
            read()
        (line,) = str(error.value).splitlines()
        assert line.startswith(f"{name!r} is not a variable of this package: ")
        assert (f"did you mean {nearest}? " in line) == bool(nearest)
        assert line.endswith(f"Allowed are {', '.join(keys.VARIABLES)}")
        # It may be a key.
        assert "5ec7e7" not in line


def test_other_names_are_let_be():
    kubernetes = ("SERVICE_HOST", "SERVICE_PORT", "SERVICE_PORT_HTTP", "PORT")
    names = [f"SCX_VLLM_{rest}" for rest in (*kubernetes, "PORT_8000_TCP_ADDR")]
    names += ["SCXD", "MY_SCX_ENC_LAYER", "VLLM_SCX_SERVICE_HOST"]
    # Of sched_ext, in /etc/default/scx.
    names += ["SCX_SCHEDULER", "SCX_FLAGS"]
    assert not keys.parse_config(dict.fromkeys(names, "1")).enabled


def load(path):
    """As a worker does: the setting, then the key."""
    return RootKey.load(
        keys.parse_config({"SCX_ENC_LAYERS": "0", "SCX_KEY_FILE": str(path)})
    )


def refusal(path):
    with pytest.raises(SCXConfigError) as error:
        load(path)
    (line,) = str(error.value).splitlines()
    assert line.startswith(f"SCX_KEY_FILE={str(path)!r}: ")
    return line


def test_key_file_is_read(key_file):
    first, second = load(key_file), load(key_file)
    assert first.fingerprint == second.fingerprint
    assert first.fingerprint == RootKey(bytes(range(32))).fingerprint


@pytest.mark.parametrize("layers", ["", "0"])
def test_the_setting_is_read_without_the_key_file(layers, tmp_path, monkeypatch):
    monkeypatch.setenv("SCX_ENC_LAYERS", layers)
    monkeypatch.setenv("SCX_KEY_FILE", str(tmp_path / "none"))
    opened = []
    monkeypatch.setattr(keys, "read_regular", lambda *args: opened.append(args))
    keys.pin_config()
    assert get_scx_config().key_file == tmp_path / "none"
    assert opened == []


@pytest.mark.parametrize("mode", [0o640, 0o604, 0o660, 0o644, 0o440, 0o602])
def test_key_file_that_others_may_read_or_write(mode, key_file):
    key_file.chmod(mode)
    line = refusal(key_file)
    assert f"its mode is {mode:04o}, not 0600" in line
    assert f"copy it with: install -m 0600 {key_file} FILE (for a secret of Kub" in line


@pytest.mark.parametrize("mode", [0o600, 0o400])
def test_key_file_of_its_owner_alone(mode, key_file):
    key_file.chmod(mode)
    assert load(key_file).fingerprint == RootKey(bytes(range(32))).fingerprint


@pytest.mark.parametrize("size", [0, 31, 33, 64])
def test_key_file_of_wrong_size(size, key_file):
    key_file.write_bytes(b"k" * size)
    line = refusal(key_file)
    assert f"it has {size} bytes" in line
    assert "kkkk" not in line


@pytest.mark.parametrize(
    "content",
    [
        bytes(32),
        b"\xff" * 32,
        b"\x00\xff" * 16,
        bytes(range(4)) * 8,
        b"0123456789abcdef" * 2,
        b"a pass phrase of some 32 letters",
        b"kFq3xZ0Lr7vT1nYb9WmC5hUe2Js8DgAo",
    ],
)
def test_key_file_that_is_not_random(content, key_file):
    key_file.write_bytes(content)
    line = refusal(key_file)
    assert "its bytes are not random" in line
    assert content.hex()[:16] not in line
    assert repr(content)[2:12] not in line


@given(st.binary(min_size=32, max_size=32))
def test_other_contents_are_taken(content):
    random = len(set(content)) >= 8 and not all(32 <= byte < 127 for byte in content)
    with tempfile.TemporaryDirectory() as folder:
        path = new_key_file(Path(folder) / "key", content)
        if random:
            assert load(path).fingerprint == RootKey(content).fingerprint
        else:
            assert "its bytes are not random" in refusal(path)


@pytest.mark.skipif(os.geteuid() != 0, reason="only root may give files away")
@pytest.mark.parametrize("owner", [0, 65534])
def test_key_file_of_another_user(owner, key_file):
    os.chown(key_file, owner, owner)
    if owner == 0:
        assert load(key_file)
    else:
        assert "it belongs to the user 65534, not to 0 or root" in refusal(key_file)


def test_key_file_of_root_and_of_others_for_a_user(key_file, monkeypatch):
    status = keys.read_regular(key_file, 33)[0]
    owners = {0: True, 1000: True, 1001: False}
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    for owner, allowed in owners.items():
        fields = [*status[:4], owner, *status[5:]]
        monkeypatch.setattr(
            keys,
            "read_regular",
            lambda *args, fields=fields: (os.stat_result(fields), os.urandom(32)),
        )
        if allowed:
            assert load(key_file)
        else:
            assert "belongs to the user 1001, not to 1000 or root" in refusal(key_file)


def test_what_is_no_file_is_refused_at_once(key_file, tmp_path):
    fifo, link, dangling, listening = (
        tmp_path / name for name in ("fifo", "link", "dangling", "socket")
    )
    os.mkfifo(fifo, 0o600)
    link.symlink_to(key_file)
    dangling.symlink_to(tmp_path / "none")
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(str(listening))
        for path in (fifo, tmp_path, listening, Path("/dev/zero"), tmp_path / "none"):
            assert "allowed is a regular file of 32 random bytes" in refusal(path)
    for path in (link, dangling):
        line = refusal(path)
        assert "it is a link, which is not followed" in line
        assert f"install -m 0600 {path} FILE" in line


def test_what_the_path_leads_to_is_opened_once(key_file, tmp_path, monkeypatch):
    """Another file may stand there at any time; what was checked is what was read."""
    evil = tmp_path / "evil"
    evil.write_bytes(os.urandom(32))
    evil.chmod(0o666)
    real, opened = os.open, []

    def racing(path, *args, **kwargs):
        descriptor = real(path, *args, **kwargs)
        if Path(path) == key_file:
            opened.append(descriptor)
            if evil.exists():
                os.replace(evil, path)
        return descriptor

    monkeypatch.setattr(os, "open", racing)
    expected = RootKey(key_file.read_bytes()).fingerprint
    assert load(key_file).fingerprint == expected
    assert len(opened) == 1
    with pytest.raises(OSError, match="Bad file descriptor"):
        os.fstat(opened[0])
    assert "its mode is 0666" in refusal(key_file)


def test_who_has_a_key_dumps_no_core():
    """Started with cores allowed; one that draws a key and one that does not."""
    code = """
import os, resource, signal, sys
hard = resource.getrlimit(resource.RLIMIT_CORE)[1]
resource.setrlimit(resource.RLIMIT_CORE, (hard, hard))
from scx.keys import RootKey, get_scx_config
if sys.argv[1] == "key":
    RootKey.load(get_scx_config())
print(*resource.getrlimit(resource.RLIMIT_CORE), hard)
"""

    def limits(*arguments):
        done = subprocess.run(  # noqa: S603
            [sys.executable, "-c", code, *arguments],
            capture_output=True,
            text=True,
            check=True,
        )
        return [int(limit) for limit in done.stdout.split()]

    soft, hard, before = limits("none")
    assert soft == hard == before
    assert limits("key") == [0 if before == 0 else 1, before, before]


def test_without_a_key_file_each_process_draws_its_own():
    config = SCXConfig((0,), "cpu", False, None)
    assert RootKey.load(config).fingerprint != RootKey.load(config).fingerprint


def test_a_stream_belongs_to_root_and_fields():
    root = RootKey(bytes(range(32)))
    stream = root.stream("a", 3, length=100_000)
    assert stream == root.stream("a", 3, length=100_000)
    assert stream[:1000] == root.stream("a", 3, length=1000)
    for other in (
        root.stream("b", 3, length=1000),
        root.stream("a", 4, length=1000),
        RootKey.draw().stream("a", 3, length=1000),
    ):
        assert sum(x == y for x, y in zip(stream, other, strict=False)) < 30


def test_derivation_is_hkdf_sha256_of_rfc_5869():
    # Test case 3 of RFC 5869: no salt, no info. It fixes the library's meaning of
    # salt=None, on which `derive` relies.
    okm = HKDF(SHA256(), 42, salt=None, info=b"").derive(b"\x0b" * 22)
    assert okm.hex() == (
        "8da4e775a563c18f715f802a063c5a31b8a11f5c5ee1879ec3454e5f3c738d2d"
        "9d201395faa4b61a96c8"
    )


def hkdf(secret, *fields):
    """The first 32 bytes of format 2, from RFC 5869 and RFC 2104 alone."""
    info = b"scx-vllm v2"
    for field in fields:
        info += struct.pack(">I", len(field)) + field
    extracted = hmac.digest(bytes(32), secret, "sha256")
    return hmac.digest(extracted, info + b"\x01", "sha256")


def test_format_2():
    """What a key file gives a model, byte for byte: stored KV rests on it."""
    secret, model = bytes(range(32)), "0123456789abcdef" * 2
    root = RootKey(secret).for_model(model)
    expected = hkdf(secret, b"model", model.encode())
    assert root._secret == expected
    assert expected.hex() == (
        "16540dec3ec0b197f698f022744ac4ce36c5b6295cd6e0d479dbf24f30242d50"
    )
    assert (
        root.fingerprint == hkdf(expected, b"fingerprint")[:8].hex() == "f828171f3881fada"
    )
    of_head = root.derive("features", 3, 1, length=32)
    assert of_head == hkdf(expected, b"features", b"3", b"1")
    words = torch.frombuffer(bytearray(of_head), dtype=torch.int64)
    permutation = derive_feature_key(root, 3, range(1, 2), 4)
    assert torch.equal(permutation[0], words.argsort())
    cipher = Cipher(ChaCha20(hkdf(expected, b"stream", b"a"), bytes(16)), mode=None)
    assert root.stream("a", length=9) == cipher.encryptor().update(bytes(9))


def test_one_key_gives_two_models_two_keys():
    file = RootKey.draw()
    first, second = file.for_model("a"), file.for_model("b")
    assert first.fingerprint == file.for_model("a").fingerprint
    roots = (file, first, second)
    assert len({root.fingerprint for root in roots}) == 3
    assert len({root.derive("features", 0, 0, length=16) for root in roots}) == 3


FIELDS = st.lists(st.one_of(st.text(max_size=3), st.integers(0, 300)), max_size=4)


@given(FIELDS, FIELDS)
def test_no_two_lists_of_fields_have_the_same_key(first, second):
    root = RootKey(bytes(range(32)))
    same = [str(field) for field in first] == [str(field) for field in second]
    assert (root.derive(*first, length=16) == root.derive(*second, length=16)) == same


def test_fields_are_framed():
    root = RootKey(bytes(range(32)))
    lists = [("a", "b"), ("ab",), ("a", "", "b"), ("", "ab"), ("a b",), (1, 11), (11, 1)]
    assert len({root.derive(*fields, length=16) for fields in lists}) == len(lists)


def test_a_root_key_shows_and_gives_away_nothing():
    secret = bytes(range(64, 96))
    root = RootKey(secret)
    assert repr(root) == f"<RootKey {root.fingerprint}>"
    assert secret.hex()[:16] not in repr(root)
    for give_away in (pickle.dumps, copy.copy, copy.deepcopy):
        with pytest.raises(TypeError, match="neither copied nor pickled"):
            give_away(root)
