"""Configuration and key material.

Every SCX_* variable is read in this file and nowhere else, and every secret
starts here. Nothing of vLLM is imported.
"""

import difflib
import errno
import os
import re
import resource
import secrets
import shlex
import stat
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from importlib.metadata import entry_points
from pathlib import Path
from typing import Literal, NoReturn

from cryptography.hazmat.primitives.ciphers import Cipher
from cryptography.hazmat.primitives.ciphers.algorithms import ChaCha20
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.kdf.hkdf import HKDF

from scx.errors import SCXConfigError
from scx.files import read_regular

ENC_LAYERS = "SCX_ENC_LAYERS"
SECURE_DEVICE = "SCX_SECURE_DEVICE"
ENABLE_DEBUG = "SCX_ENABLE_DEBUG"
KEY_FILE = "SCX_KEY_FILE"
CODEC = "SCX_CODEC"
HOST_THREADS = "SCX_HOST_THREADS"
VARIABLES = (ENC_LAYERS, SECURE_DEVICE, ENABLE_DEBUG, CODEC, KEY_FILE, HOST_THREADS)

DEFAULT_CODEC = "permutation"
CODECS = {
    "permutation": "scx.codecs.permutation:PermutationCodec",
    "affine": "scx.codecs.affine:AffineCodec",
}
"""What SCX_CODEC may name, and the class of each: module:class."""

KEY_BYTES = 32
_ALLOWED_KEY_FILE = (
    f"a regular file of {KEY_BYTES} random bytes that its owner alone may read; "
    f"make one with: (umask 077; head -c {KEY_BYTES} /dev/urandom > FILE)"
)
FORMAT = 2
"""Of all that turns a key into an encoding, and of the label of stored KV."""

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
    codec: str = DEFAULT_CODEC
    """How features are encoded: one of CODECS."""
    host_threads: int | None = None
    """Threads of each rank, if the host serves a GPU; None: as the cores allow."""

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

    Raises SCXConfigError, and sets nothing, if a value is malformed, if vLLM
    would not load this plugin, or if vLLM already read another setting in
    this process.
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

    vLLM calls plugins once per process and caches the model class that it
    chose, so a later change would take effect only in part.
    """
    global _config_of_process
    _config_of_process = get_scx_config()


def require_unchanged(config: SCXConfig) -> None:
    """Raise SCXConfigError unless `config` is what `pin_config` saw."""
    if _config_of_process is None:
        raise SCXConfigError(
            "the SCX variables were malformed when vLLM first read them in this process: "
            "start a new process"
        )
    then = dict(_spelled(_config_of_process))
    changed = [
        f"{variable}={value!r} (then {then[variable]!r})"
        for variable, value in _spelled(config)
        if value != then[variable]
    ]
    if changed:
        raise SCXConfigError(
            f"{', '.join(changed)}: the SCX variables must stay as they were when vLLM "
            "first read them in this process; set them earlier or start a new process"
        )


def _spelled(config: SCXConfig) -> Iterator[tuple[str, str]]:
    """Each variable with a text that says the same."""
    yield ENC_LAYERS, layers_text(config.enc_layers)
    yield SECURE_DEVICE, config.secure_device
    yield ENABLE_DEBUG, str(config.enable_debug).lower()
    yield CODEC, config.codec
    yield KEY_FILE, str(config.key_file or "")
    yield HOST_THREADS, str(config.host_threads or "")


def framed(*fields: str | int) -> bytes:
    """Each field in UTF-8 behind its length in four bytes, big-endian, so that no two
    lists of fields have the same.
    """
    texts = [str(field).encode() for field in fields]
    return b"".join(len(text).to_bytes(4, "big") + text for text in texts)


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
        """The key in `config.key_file`, or a fresh one if there is none.

        From here on the process writes no core file. Raises SCXConfigError for a file
        that others may read or may have written, or whose bytes are not random.
        """
        _leave_no_core()
        if config.key_file is None:
            return cls.draw()
        return cls(_read_key_file(config.key_file))

    def for_model(self, identity: str) -> "RootKey":
        """The root key of one model, from which the file's cannot be calculated."""
        return RootKey(self.derive("model", identity, length=KEY_BYTES))

    def derive(self, *fields: str | int, length: int) -> bytes:
        """`length` bytes (at most 8160) that belong to `fields`: HKDF-SHA256, RFC 5869.

        Its info is "scx-vllm v2" and then the framed fields.
        """
        info = f"scx-vllm v{FORMAT}".encode() + framed(*fields)
        return HKDF(SHA256(), length, salt=None, info=info).derive(self._secret)

    def stream(self, *fields: str | int, length: int) -> bytes:
        """As `derive`, of any length: ChaCha20, RFC 8439, under a derived key."""
        key = self.derive("stream", *fields, length=KEY_BYTES)
        encryptor = Cipher(ChaCha20(key, nonce=bytes(16)), mode=None).encryptor()
        return encryptor.update(bytes(length))

    @property
    def fingerprint(self) -> str:
        """16 hexadecimal digits that name the key and may be shown."""
        return self.derive("fingerprint", length=8).hex()

    def __repr__(self) -> str:
        return f"<RootKey {self.fingerprint}>"

    def __reduce__(self) -> NoReturn:
        raise TypeError("a key is neither copied nor pickled")


def parse_config(environ: Mapping[str, str]) -> SCXConfig:
    """The setting that some variables make. Raises SCXConfigError.

    The key file is not looked at: most processes that read the setting need no key.
    """
    _reject_unknown(environ)
    key_file = environ.get(KEY_FILE, "").strip()
    return SCXConfig(
        enc_layers=_parse_layers(environ.get(ENC_LAYERS, "")),
        secure_device=_parse_device(environ.get(SECURE_DEVICE, "cpu")),
        enable_debug=_parse_bool(environ.get(ENABLE_DEBUG, "false")),
        key_file=Path(key_file) if key_file else None,
        codec=_parse_codec(environ.get(CODEC, DEFAULT_CODEC)),
        host_threads=_parse_threads(environ.get(HOST_THREADS, "")),
    )


def _reject(variable: str, value: object, allowed: str) -> NoReturn:
    raise SCXConfigError(f"{variable}={value!r}: {allowed}")


# Kubernetes gives such variables to each pod, if a service is called scx-vllm.
_SERVICE = re.compile(
    r"SCX_(\w+_)?(SERVICE_HOST|SERVICE_PORT(_\w+)?|PORT(_\d+_(TCP|UDP|SCTP)(_\w+)?)?)"
)
# Those of sched_ext, schedulers for Linux, whose files are called scx too.
_FOREIGN = ("SCX_SCHEDULER", "SCX_FLAGS")


def _reject_unknown(environ: Mapping[str, str]) -> None:
    """Refuse unknown variables: a setting that nothing reads silently has no effect."""
    for name in environ:
        known = name.strip().upper()
        if not known.startswith("SCX_") or name in (*VARIABLES, *_FOREIGN):
            continue
        if _SERVICE.fullmatch(known) and not known.startswith(VARIABLES):
            continue
        nearest = difflib.get_close_matches(known, VARIABLES, 1, cutoff=0.7)
        meant = f"did you mean {nearest[0]}? " if nearest else ""
        # Without its value: what was meant may be the key itself.
        raise SCXConfigError(
            f"{name!r} is not a variable of this package: {meant}"
            f"Allowed are {', '.join(VARIABLES)}"
        )


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


def layers_text(layers: Iterable[int] | str) -> str:
    """As SCX_ENC_LAYERS spells it."""
    return layers if isinstance(layers, str) else ",".join(map(str, layers))


def _parse_device(text: str) -> str:
    """Check without touching the device: CUDA must not start before vLLM forks."""
    # Without torch, which takes seconds to load: commands that need no device read this.
    if text.strip() == "cpu":
        return "cpu"
    import torch

    try:
        device = torch.device(text.strip())
        count = torch.get_device_module(device).device_count()
    except (RuntimeError, AttributeError):
        _reject(SECURE_DEVICE, text, _devices_here())
    if (device.index or 0) >= count:
        _reject(SECURE_DEVICE, text, _devices_here())
    return str(device)


def _devices_here() -> str:
    import torch

    names = ["cpu"]
    if count := torch.accelerator.device_count():
        kind = str(torch.accelerator.current_accelerator())
        names += [kind, *(f"{kind}:{index}" for index in range(count))]
    return f"a torch device of this machine is allowed: {', '.join(names)}"


def _parse_codec(text: str) -> str:
    name = text.strip().lower()
    if name not in CODECS:
        _reject(CODEC, text, f"one of {', '.join(CODECS)}")
    return name


def _parse_threads(text: str) -> int | None:
    if not (number := text.strip()):
        return None
    if not re.fullmatch("[0-9]{1,3}", number) or int(number) == 0:
        _reject(HOST_THREADS, text, "a whole number from 1 to 999, or nothing")
    return int(number)


def _parse_bool(text: str) -> bool:
    word = text.strip().lower()
    if word not in _TRUE + _FALSE:
        _reject(ENABLE_DEBUG, text, f"one of {', '.join(_TRUE + _FALSE)}")
    return word in _TRUE


def require_key_file(config: SCXConfig) -> None:
    """Raise SCXConfigError, as loading would, if the key file's kind, owner, mode or
    size is refused.

    Its content is not read: the process that configures an engine needs no key.
    """
    if config.key_file is not None:
        _open_key_file(config.key_file, 0)


def _read_key_file(path: Path) -> bytes:
    """The content of a key file."""
    content = _open_key_file(path, KEY_BYTES + 1)
    # Fewer than one random file in 10^13 is refused here.
    is_text = content.isascii() and content.decode().isprintable()
    if is_text or len(set(content)) < KEY_BYTES // 4:
        _reject(KEY_FILE, str(path), f"its bytes are not random; {_ALLOWED_KEY_FILE}")
    return content


def _open_key_file(path: Path, limit: int) -> bytes:
    """Up to `limit` bytes of a file that nobody else may have read or written.

    Its owner is this user or root, who may read and write this user's files anyway.
    """
    copy = (
        f"copy it with: install -m 0600 {shlex.quote(str(path))} FILE (for a secret of "
        f"Kubernetes in an init container), and name FILE in {KEY_FILE}"
    )
    try:
        status, content = read_regular(path, limit)
    except OSError as error:
        if error.errno == errno.ELOOP:
            _reject(KEY_FILE, str(path), f"it is a link, which is not followed: {copy}")
        allowed = f"{error.strerror}; allowed is {_ALLOWED_KEY_FILE}"
        _reject(KEY_FILE, str(path), allowed)
    if status.st_uid not in (0, os.geteuid()):
        owner = f"it belongs to the user {status.st_uid}, not to {os.geteuid()} or root"
        _reject(KEY_FILE, str(path), f"{owner}: {copy}")
    if status.st_mode & 0o077:
        mode = stat.S_IMODE(status.st_mode)
        _reject(KEY_FILE, str(path), f"its mode is {mode:04o}, not 0600: {copy}")
    if status.st_size != KEY_BYTES:
        size = f"it has {status.st_size} bytes, with any newline or encoding"
        _reject(KEY_FILE, str(path), f"{size}; {_ALLOWED_KEY_FILE}")
    return content


def _leave_no_core() -> None:
    """Have this process and its children dump no core, which would hold keys.

    Linux writes no file at a limit below a page, and at 1 hands no core to a program
    either, which it would at 0 (fs/coredump.c). PR_SET_DUMPABLE does more: it blocks
    debuggers, and what ranks need to share GPU memory.
    """
    hard = resource.getrlimit(resource.RLIMIT_CORE)[1]
    soft = 1 if hard == resource.RLIM_INFINITY else min(1, hard)
    resource.setrlimit(resource.RLIMIT_CORE, (soft, hard))
