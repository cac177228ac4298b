"""KV that outlives an engine: where it may go, and the label of what holds it.

Read under another key, encoded KV decodes to nonsense without an error. So a store
that outlives its engine carries a label, which every engine compares with its own
setting before weights load. Nothing in it is secret.
"""

import contextlib
import errno
import json
import os
import re
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import IO, Any, NoReturn

from scx.errors import SCXConfigError
from scx.files import read_regular, sync_folder
from scx.keys import CODEC, ENC_LAYERS, FORMAT, KEY_FILE, SCXConfig
from scx.plugin.identity import identity_of

IN_MEMORY = ("OffloadingConnector", "SimpleCPUOffloadConnector")
"""Connectors of vLLM whose store dies with the engine, set as in _MEMORY_SETTINGS."""
IN_FOLDER = ("ExampleConnector", "SharedStorageConnector")
"""The connector of vLLM whose store is a folder, by its newer and its older name."""

FOLDER = "shared_storage_path"
DEFAULT_FOLDER = "/tmp"  # noqa: S108 - vLLM's, if FOLDER is not set
LABEL = "scx.json"
_LABEL_BYTES = 1 << 16
# What file systems without hard links say to them.
_NO_HARD_LINKS = (errno.EPERM, errno.EOPNOTSUPP, errno.ENOSYS, errno.EMLINK)
_SHOWN = 200
"""Characters of a label's value in an error."""
_NO_LABEL = f"its {LABEL} is not a label of this package"
_ANEW = "use an empty folder"
_DRAFT = re.compile(rf"{re.escape(LABEL)}\.[a-z0-9_]{{8}}\.draft")

# What vLLM's memory connectors may be told about their tiers: the defaults.
_MEMORY_SETTINGS = {"spec_name": "CPUOffloadingSpec", "kv_offload_backend": "cpu"}
_TIERING = "TieringOffloadingSpec"
_SEALED = f"spec_name={_TIERING!r} with no other secondary_tiers than 'sealed' ones"
_WAYS_OUT = {
    "format": "version of this package",
    "model": "model, from one folder or one commit of the hub",
    "key": f"key in {KEY_FILE}",
    "codec": CODEC,
    "layers": ENC_LAYERS,
}


def connector_of(vllm_config: Any) -> str | None:
    """The name of the KV connector of an engine's configuration, None without one.

    vLLM derives the connector of kv_offloading_size after our hook, so we name it here.
    """
    cache, transfer = vllm_config.cache_config, vllm_config.kv_transfer_config
    if getattr(cache, "kv_offloading_size", None) is None:
        return transfer and transfer.kv_connector
    backend = cache.kv_offloading_backend
    return IN_MEMORY[0] if backend == "native" else backend


def obstacles(vllm_config: Any, config: SCXConfig) -> Iterator[str]:
    """Why KV would go where nothing compares keys, with the way out."""
    name, transfer = connector_of(vllm_config), vllm_config.kv_transfer_config
    if name is None:
        return
    settings = transfer.kv_connector_extra_config if transfer else {}
    if name not in IN_MEMORY + IN_FOLDER or (
        transfer and getattr(transfer, "kv_connector_module_path", None)
    ):
        yield (
            f"the KV connector {name} cannot carry a label of the key, without which "
            "another key would read nonsense: allowed are vLLM's own "
            f"{', '.join(IN_MEMORY)} (in memory) and {IN_FOLDER[0]} (in a folder)"
        )
    elif name in IN_MEMORY:
        for setting, in_memory in _MEMORY_SETTINGS.items():
            if setting == "spec_name" and _is_sealed(name, settings):
                continue
            if (value := settings.get(setting, in_memory)) != in_memory:
                yield (
                    f"{setting}={value!r} of {name} keeps KV beyond the engine's memory, "
                    f"where nothing checks the key: use {in_memory!r}, or {_SEALED}"
                )
    elif config.key_file is None:
        yield (
            "KV transfer needs the same key on both sides: set "
            f"{KEY_FILE} to a key file that both have"
        )
    elif not (isinstance(folder := settings.get(FOLDER), str) and folder):
        yield (
            f"{name} has no folder of its own: set {FOLDER} in kv_connector_extra_config"
        )


def _sealed_tiers(settings: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The sealed tiers in a connector's settings."""
    tiers = settings.get("secondary_tiers", [])
    return [tier for tier in tiers if tier.get("type") == "sealed"]


def _is_sealed(name: str, settings: Mapping[str, Any]) -> bool:
    """Whether KV leaves the engine's memory into sealed tiers and nowhere else."""
    tiers = settings.get("secondary_tiers", [])
    return (
        name == IN_MEMORY[0]
        and settings.get("spec_name") == _TIERING
        and len(_sealed_tiers(settings)) == len(tiers) > 0
    )


def prepare_tiers(
    vllm_config: Any, config: SCXConfig, record: Mapping[str, Any] | None
) -> None:
    """Tell sealed tiers what their blocks are: of which model, and how it is encoded.

    `record` is that of the plan, None if no layer is encoded. Adds module_path, so that a
    user need not. Raises SCXConfigError without a key file.
    """
    transfer = vllm_config.kv_transfer_config
    tiers = _sealed_tiers(transfer.kv_connector_extra_config) if transfer else []
    if not tiers:
        return
    if config.key_file is None:
        raise SCXConfigError(f"a sealed tier needs a key: set {KEY_FILE} to a key file")
    model_config = vllm_config.model_config
    facts = {
        "model": record["model"] if record else identity_of(model_config),
        "dtype": str(model_config.dtype),
        "cache_dtype": str(vllm_config.cache_config.cache_dtype),
        "encoding": record and [FORMAT, record["codec"], record["layers"]],
    }
    for tier in tiers:
        tier |= {"module_path": "scx.sealed", "facts": facts}


def outlives_engine(vllm_config: Any) -> bool:
    """Whether KV goes where it needs a label."""
    return connector_of(vllm_config) in IN_FOLDER


def require_unlabelled(vllm_config: Any) -> None:
    """Refuse a labelled folder to an engine that encodes nothing.

    It would read encoded KV as its own, and write plain KV under the label. Any text in
    the KV connector's settings may be a folder: connectors and tiers name it in many
    ways. Raises SCXConfigError.
    """
    transfer = vllm_config.kv_transfer_config
    if transfer is None or transfer.kv_connector is None:
        return
    settings = transfer.kv_connector_extra_config
    if transfer.kv_connector in IN_FOLDER:
        settings = {FOLDER: DEFAULT_FOLDER} | settings
    for text in _texts(settings):
        folder = Path(text.removeprefix("file://"))
        if os.path.lexists(folder / LABEL):
            raise SCXConfigError(
                f"{transfer.kv_connector} is given the folder {str(folder)!r}, whose "
                f"{LABEL} says that its KV is encoded, and {ENC_LAYERS} is empty: set it "
                "as for the engines that wrote there, or use another folder"
            )


def _texts(settings: Any) -> Iterator[str]:
    """All texts and paths in nested settings."""
    if isinstance(settings, str | os.PathLike):
        yield os.fspath(settings)
    elif isinstance(settings, Mapping):
        yield from _texts(list(settings.values()))
    elif isinstance(settings, list | tuple):
        for each in settings:
            yield from _texts(each)


def claim(vllm_config: Any, fingerprint: str, record: Mapping[str, Any]) -> None:
    """Label this engine's store, or compare the label that it has.

    `fingerprint` is that of the model's root key; `record` holds the model, the codec
    and the layers. Does nothing if the store dies with the engine. Raises
    SCXConfigError for a label that differs or is none, for files without a label, and for
    a folder that cannot be written.
    """
    if not outlives_engine(vllm_config):
        return
    folder = Path(vllm_config.kv_transfer_config.kv_connector_extra_config[FOLDER])
    ours = {"format": FORMAT, "model": record["model"], "key": fingerprint}
    ours |= {name: record[name] for name in ("codec", "layers")}
    try:
        folder.mkdir(parents=True, exist_ok=True)
        _write_once(folder, ours)
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else error
        _reject(folder, f"{reason}; allowed is a folder that can be written")
    theirs = _read(folder)
    for name, value in ours.items():
        if theirs[name] != value:
            _reject(
                folder,
                f"it holds KV of {name} {_shown(theirs[name])}, and this engine has "
                f"{name} {_shown(value)}: use the same {_WAYS_OUT[name]}, or {_ANEW}",
            )


def _write_once(folder: Path, label: Mapping[str, Any]) -> None:
    """Write the label unless there is one, whole or not at all, and to stay."""
    files = list(os.scandir(folder))
    if any(file.name == LABEL for file in files):
        return
    # Drafts belong to engines that start now too, or that were killed then.
    others = [
        file.name
        for file in files
        if not (_DRAFT.fullmatch(file.name) and file.is_file(follow_symlinks=False))
    ]
    if others:
        _reject(
            folder,
            f"it holds files but no {LABEL}, so nothing says whose KV they are "
            f"({_shown(min(others))}, for one): {_ANEW}",
        )
    with tempfile.NamedTemporaryFile(
        "w", dir=folder, prefix=f"{LABEL}.", suffix=".draft"
    ) as draft:
        _dump(label, draft)
        with contextlib.suppress(FileExistsError):
            try:
                (folder / LABEL).hardlink_to(draft.name)
            except OSError as error:
                if error.errno not in _NO_HARD_LINKS:
                    raise
                # Still the first engine's. One that finds half a label is refused.
                with open(folder / LABEL, "x") as file:
                    _dump(label, file)
    sync_folder(folder)


def _dump(label: Mapping[str, Any], file: IO[str]) -> None:
    json.dump(label, file)
    file.flush()
    # Nothing in it is secret, and engines of other users may share the folder.
    os.fchmod(file.fileno(), 0o644)
    os.fsync(file.fileno())


def _read(folder: Path) -> dict[str, Any]:
    """The folder's label. One of another format is known by that alone."""
    try:
        status, content = read_regular(folder / LABEL, _LABEL_BYTES)
        label = json.loads(content.decode())
    except OSError as error:
        _reject(folder, f"{_NO_LABEL} that can be read ({error.strerror}): {_ANEW}")
    except (ValueError, RecursionError):
        _reject(folder, f"{_NO_LABEL}: {_ANEW}")
    if status.st_size > _LABEL_BYTES or not _is_label(label):
        _reject(folder, f"{_NO_LABEL}: {_ANEW}")
    return label


def _is_label(label: Any) -> bool:
    if not isinstance(label, dict) or type(label.get("format")) is not int:
        return False
    # Nothing else is known of another format, or compared.
    return label["format"] != FORMAT or (
        label.keys() == {"format", "model", "key", "codec", "layers"}
        and all(isinstance(label[name], str) for name in ("model", "key", "codec"))
        and isinstance(label["layers"], list)
        and all(type(layer) is int for layer in label["layers"])
    )


def _shown(value: object) -> str:
    """On one line and short, as anyone may have written it."""
    text = repr(value)
    return text if len(text) <= _SHOWN else f"{text[:_SHOWN]}..."


def _reject(folder: Path, reason: str) -> NoReturn:
    raise SCXConfigError(f"{FOLDER}={str(folder)!r}: {reason}")
