"""Configuration and key material.

Every SCX_* variable is read in this file and nowhere else, and every secret
starts here. Nothing of vLLM is imported.
"""

import os
import re
import secrets
import stat
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from importlib.metadata import entry_points
from pathlib import Path
from typing import Literal, NoReturn

import torch
from cryptography.hazmat.primitives.ciphers import Cipher
from cryptography.hazmat.primitives.ciphers.algorithms import ChaCha20
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.kdf.hkdf import HKDF

from scx.errors import SCXConfigError

ENC_LAYERS = "SCX_ENC_LAYERS"
SECURE_DEVICE = "SCX_SECURE_DEVICE"
ENABLE_DEBUG = "SCX_ENABLE_DEBUG"
KEY_FILE = "SCX_KEY_FILE"
CODEC = "SCX_CODEC"

CODECS = ("permutation", "affine")
"""What SCX_CODEC may name; the first is the default."""

KEY_BYTES = 32

_PLUGIN_GROUP = "vllm.general_plugins"
_PLUGIN_TARGET = "scx:init_vllm_plugin"
_TRUE = ("1", "true", "yes", "on")
_FALSE = ("0", "false", "no", "off")


@dataclass(frozen=True)
class SCXConfig:
    """What the SCX_* variables ask for. It holds no secret."""

    enc_layers: tuple[int, ...] | Literal["all"]
    """Encoded layers: sorted indices without repeats, or ``"all"``; empty is off."""
    secure_device: str
    """Where secrets live: any torch device of this machine, as torch spells it."""
    enable_debug: bool
    """Whether each encoded layer logs each step."""
    key_file: Path | None
    """A file with the root key, or None: a root key is drawn in each process."""
    codec: str = CODECS[0]
    """How features are encoded: one of CODECS."""

    @property
    def enabled(self) -> bool:
        """Whether any layer is to be encoded."""
        return bool(self.enc_layers)

    def layers_of(self, num_layers: int) -> tuple[int, ...]:
        """The encoded layers of a model that has `num_layers` layers.

        Raises SCXConfigError for an index that the model does not have.
        """
        if self.enc_layers == "all":
            return tuple(range(num_layers))
        if beyond := [layer for layer in self.enc_layers if layer >= num_layers]:
            _reject(
                ENC_LAYERS,
                ",".join(map(str, beyond)),
                f"this model has the layers 0 to {num_layers - 1}",
            )
        return self.enc_layers


def get_scx_config() -> SCXConfig:
    """Read the SCX_* variables of this process.

    Raises SCXConfigError; its last line names the variable, its value and
    what is allowed.
    """
    return parse_config(os.environ)


def scx_env_init(
    enc_layers: str | Iterable[int],
    secure_device: str = "cpu",
    enable_debug: bool | str = False,
    codec: str | None = None,
) -> None:
    """Set the SCX_* variables for this process and its children.

    Call it before the first engine of the process. `enc_layers` is a string
    as in SCX_ENC_LAYERS or an iterable of layer indices. Without `codec`,
    SCX_CODEC stays as it is.

    Raises SCXConfigError, and sets nothing, where a value is malformed, where
    vLLM would not load this plugin, or where vLLM already read another
    setting in this process.
    """
    if not isinstance(enc_layers, str):
        enc_layers = ",".join(_layer_text(layer) for layer in enc_layers)
    variables = {
        ENC_LAYERS: enc_layers,
        SECURE_DEVICE: str(secure_device),
        ENABLE_DEBUG: str(enable_debug),
    } | ({CODEC: codec} if codec is not None else {})
    config = parse_config({**os.environ, **variables})
    if obstacle := plugin_obstacle():
        raise SCXConfigError(obstacle)
    if _config_of_process is not None:
        require_unchanged(config)
    os.environ.update(variables)


def plugin_obstacle() -> str | None:
    """Why vLLM would not load this plugin, with the way out; None if it would."""
    names = [
        point.name
        for point in entry_points(group=_PLUGIN_GROUP)
        if point.value == _PLUGIN_TARGET
    ]
    if not names:
        return (
            f"no entry point {_PLUGIN_TARGET} in the group {_PLUGIN_GROUP}: "
            "install this package in vLLM's environment (pip install -e .)"
        )
    allowed = os.environ.get("VLLM_PLUGINS")
    if allowed is not None and names[0] not in allowed.split(","):
        return (
            f"VLLM_PLUGINS={allowed!r} keeps vLLM from loading this plugin: "
            f"add {names[0]!r} to it or unset it"
        )
    return None


_config_of_process: SCXConfig | None = None


def pin_config() -> None:
    """Make the present setting the only one that this process accepts.

    vLLM calls plugins once a process and caches the model class that it
    chose, so a setting that changes afterwards would be followed by half.
    """
    global _config_of_process
    _config_of_process = get_scx_config()


def require_unchanged(config: SCXConfig) -> None:
    """Raise SCXConfigError unless `config` is what `pin_config` saw."""
    if config == _config_of_process:
        return
    pinned = _config_of_process.enc_layers if _config_of_process else "malformed"
    raise SCXConfigError(
        f"{ENC_LAYERS}={_layers_text(config.enc_layers)!r} and the other SCX "
        "variables must stay as they were when vLLM first read them in this process "
        f"(then {_layers_text(pinned)!r}): set them earlier or start a new process"
    )


class RootKey:
    """The secret from which all feature keys of a process are derived.

    The bytes are in no repr and cannot be copied or pickled, so that no
    tracer, cache or log can hold them by accident.
    """

    __slots__ = ("_secret",)

    def __init__(self, secret: bytes) -> None:
        if len(secret) != KEY_BYTES:
            raise SCXConfigError(f"a root key has {KEY_BYTES} bytes")
        self._secret = secret

    @classmethod
    def draw(cls) -> "RootKey":
        """A fresh key from the operating system."""
        return cls(secrets.token_bytes(KEY_BYTES))

    @classmethod
    def load(cls, config: SCXConfig) -> "RootKey":
        """The key in `config.key_file`, or a fresh one where there is none."""
        if config.key_file is None:
            return cls.draw()
        _check_key_file(config.key_file)
        return cls(config.key_file.read_bytes())

    def derive(self, label: str, length: int) -> bytes:
        """`length` bytes (at most 8160) that belong to `label`: HKDF-SHA256, RFC 5869."""
        info = f"scx-vllm v1 {label}".encode()
        return HKDF(SHA256(), length, salt=None, info=info).derive(self._secret)

    def stream(self, label: str, length: int) -> bytes:
        """As `derive`, of any length: ChaCha20, RFC 8439, under a derived key."""
        algorithm = ChaCha20(self.derive(label, KEY_BYTES), nonce=bytes(16))
        return Cipher(algorithm, mode=None).encryptor().update(bytes(length))

    @property
    def fingerprint(self) -> str:
        """16 hexadecimal digits that name the key and may be shown."""
        return self.derive("fingerprint", 8).hex()

    def __repr__(self) -> str:
        return f"<RootKey {self.fingerprint}>"

    def __reduce__(self) -> NoReturn:
        raise TypeError("a key is neither copied nor pickled")


def parse_config(environ: Mapping[str, str]) -> SCXConfig:
    """The setting that some variables make. Raises SCXConfigError."""
    key_file = environ.get(KEY_FILE, "").strip()
    if key_file:
        _check_key_file(Path(key_file))
    return SCXConfig(
        enc_layers=_parse_layers(environ.get(ENC_LAYERS, "")),
        secure_device=_parse_device(environ.get(SECURE_DEVICE, "cpu")),
        enable_debug=_parse_bool(environ.get(ENABLE_DEBUG, "false")),
        key_file=Path(key_file) if key_file else None,
        codec=_parse_codec(environ.get(CODEC, CODECS[0])),
    )


def _reject(variable: str, value: object, allowed: str) -> NoReturn:
    raise SCXConfigError(f"{variable}={value!r}: {allowed}")


def _parse_layers(text: str) -> tuple[int, ...] | Literal["all"]:
    if text.strip().lower() == "all":
        return "all"
    items = [item.strip() for item in text.split(",")] if text.strip() else []
    if not all(re.fullmatch("[0-9]{1,9}", item) for item in items):
        _reject(
            ENC_LAYERS,
            text,
            "comma-separated layer indices such as 0,27, or all, or nothing",
        )
    return tuple(sorted({int(item) for item in items}))


def _layer_text(layer: object) -> str:
    if isinstance(layer, bool) or not isinstance(layer, int) or layer < 0:
        _reject("enc_layers", layer, "layer indices are whole numbers from 0")
    return str(layer)


def _layers_text(layers: Iterable[int] | str) -> str:
    return layers if isinstance(layers, str) else ",".join(map(str, layers))


def _parse_device(text: str) -> str:
    """Check without touching the device: CUDA must not start before vLLM forks."""
    allowed = "a torch device of this machine, such as cpu, cuda or cuda:1"
    try:
        device = torch.device(text.strip())
        count = torch.get_device_module(device).device_count()
    except (RuntimeError, AttributeError):
        _reject(SECURE_DEVICE, text, allowed)
    if (device.index or 0) >= count:
        _reject(SECURE_DEVICE, text, f"{allowed}; {device.type} devices here: {count}")
    return str(device)


def _parse_codec(text: str) -> str:
    name = text.strip().lower()
    if name not in CODECS:
        _reject(CODEC, text, f"one of {', '.join(CODECS)}")
    return name


def _parse_bool(text: str) -> bool:
    word = text.strip().lower()
    if word not in _TRUE + _FALSE:
        _reject(ENABLE_DEBUG, text, f"one of {', '.join(_TRUE + _FALSE)}")
    return word in _TRUE


def _check_key_file(path: Path) -> None:
    allowed = (
        f"a regular file of {KEY_BYTES} random bytes that its owner alone may read; "
        f"make one with: (umask 077; head -c {KEY_BYTES} /dev/urandom > FILE)"
    )
    try:
        status = path.stat()
    except OSError as error:
        _reject(KEY_FILE, str(path), f"{error.strerror}; allowed is {allowed}")
    if not stat.S_ISREG(status.st_mode) or not os.access(path, os.R_OK):
        _reject(KEY_FILE, str(path), f"not a readable file; allowed is {allowed}")
    if status.st_mode & 0o077:
        mode = stat.S_IMODE(status.st_mode)
        _reject(KEY_FILE, str(path), f"its mode is {mode:04o}, not 0600; {allowed}")
    if status.st_size != KEY_BYTES:
        _reject(KEY_FILE, str(path), f"it has {status.st_size} bytes; {allowed}")
