"""KV that outlives an engine: where it may go, and the label of what holds it.

Read under another key, encoded KV decodes to nonsense without an error. So a store
that outlives its engine carries a label, which every engine compares with its own
setting before weights load. Nothing in it is secret.
"""

import contextlib
import json
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NoReturn

from scx.errors import SCXConfigError
from scx.keys import CODEC, ENC_LAYERS, KEY_FILE, SCXConfig

IN_MEMORY = ("OffloadingConnector", "SimpleCPUOffloadConnector")
"""Connectors of vLLM whose store dies with the engine, set as in _MEMORY_SETTINGS."""
IN_FOLDER = ("ExampleConnector", "SharedStorageConnector")
"""The connector of vLLM whose store is a folder, by its newer and its older name."""

FOLDER = "shared_storage_path"
LABEL = "scx.json"
FORMAT = 1
"""Of the label and of all that turns a key into an encoding."""

# What vLLM's memory connectors may be told about their tiers: the defaults.
_MEMORY_SETTINGS = {"spec_name": "CPUOffloadingSpec", "kv_offload_backend": "cpu"}
_WAYS_OUT = {
    "format": "this package's version",
    "key": f"{KEY_FILE} with that key",
    "codec": CODEC,
    "layers": ENC_LAYERS,
}


def connector_of(vllm_config: Any) -> str | None:
    """The name of the KV connector of an engine's configuration, None without one.

    vLLM names that of kv_offloading_size after our hook ran, so it is named here.
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
            if (value := settings.get(setting, in_memory)) != in_memory:
                yield (
                    f"{setting}={value!r} of {name} keeps KV beyond the engine's memory, "
                    f"where no label of the key goes: use {in_memory!r}"
                )
    elif config.key_file is None:
        yield (
            "KV transfer needs the same key on both sides: set "
            f"{KEY_FILE} to a key file that both have"
        )
    elif not settings.get(FOLDER):
        yield (
            f"{name} has no folder of its own: set {FOLDER} in kv_connector_extra_config"
        )


def claim(vllm_config: Any, fingerprint: str, record: Mapping[str, Any]) -> None:
    """Label this engine's store, or compare the label that it has.

    `fingerprint` is the root key's, `record` holds the codec and the layers. Does
    nothing where the store dies with the engine. Raises SCXConfigError for a label
    that differs, for files without a label, and for a folder that cannot be written.
    """
    if connector_of(vllm_config) not in IN_FOLDER:
        return
    folder = Path(vllm_config.kv_transfer_config.kv_connector_extra_config[FOLDER])
    ours = {"format": FORMAT, "key": fingerprint}
    ours |= {name: record[name] for name in ("codec", "layers")}
    try:
        folder.mkdir(parents=True, exist_ok=True)
        theirs = _label_once(folder, ours)
    except OSError as error:
        _reject(folder, f"{error.strerror}; allowed is a folder that can be written")
    except (TypeError, ValueError):
        _reject(folder, f"its {LABEL} is no label of this package: use an empty folder")
    for name, value in ours.items():
        if theirs.get(name) != value:
            _reject(
                folder,
                f"it holds KV of {name} {theirs.get(name)}, and this engine has {name} "
                f"{value}: set {_WAYS_OUT[name]} alike, or use an empty folder",
            )


def _label_once(folder: Path, label: Mapping[str, Any]) -> dict[str, Any]:
    """Write the label unless there is one, whole or not at all; the one that is there."""
    names = [file.name for file in folder.iterdir()]
    # Those that begin like it are drafts, of engines that start at the same time.
    if LABEL not in names and not all(name.startswith(LABEL) for name in names):
        _reject(
            folder,
            f"it holds files but no {LABEL}, so nothing says whose KV they are: use an "
            "empty folder",
        )
    with tempfile.NamedTemporaryFile("w", dir=folder, prefix=f"{LABEL}.") as draft:
        json.dump(label, draft)
        draft.flush()
        with contextlib.suppress(FileExistsError):
            (folder / LABEL).hardlink_to(draft.name)
    return dict(json.loads((folder / LABEL).read_text()))


def _reject(folder: Path, reason: str) -> NoReturn:
    raise SCXConfigError(f"{FOLDER}={str(folder)!r}: {reason}")
