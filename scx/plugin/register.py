"""Joining vLLM: the two methods of vLLM that this package wraps.

The first sees the configuration of every engine, whatever architecture it names and
whichever plugin registered that. The second sees every model that was loaded, before
its worker serves, and stops what the first missed or another plugin undid.
"""

import json
from collections.abc import Callable
from datetime import timedelta
from functools import cache, wraps
from typing import Any

from torch import distributed

from scx.errors import SCXNotEncodedError, SCXUnsupportedError
from scx.keys import ENC_LAYERS, get_scx_config
from scx.plugin.architectures import EncodedModel
from scx.plugin.configure import configure
from scx.plugin.plan import record_of

PATIENCE = timedelta(minutes=5)
"""How long a rank waits for others to load their part of a model."""


@cache
def join() -> None:
    """Wrap both, once per process. Raises SCXUnsupportedError if one is missing."""
    from vllm.config import VllmConfig
    from vllm.v1.worker.worker_base import WorkerWrapperBase

    verify = _method(VllmConfig, "try_verify_and_update_config")
    initialize = _method(WorkerWrapperBase, "initialize_from_config")

    # Runs every time, even after a refusal; vLLM's own once per ModelConfig.
    @wraps(verify)
    def try_verify_and_update_config(self: Any) -> None:
        verify(self)
        configure(self)

    # Executors of all kinds call it when the model is loaded and before it serves.
    @wraps(initialize)
    def initialize_from_config(self: Any, *args: Any, **kwargs: Any) -> None:
        require_encoded(self.vllm_config, self.worker)
        if distributed.is_initialized() and distributed.get_world_size() > 1:
            require_alike(
                distributed.distributed_c10d._get_default_store(),
                distributed.get_rank(),
                distributed.get_world_size(),
                record_of(self.vllm_config),
            )
        initialize(self, *args, **kwargs)

    VllmConfig.try_verify_and_update_config = try_verify_and_update_config
    WorkerWrapperBase.initialize_from_config = initialize_from_config


def _method(owner: type, name: str) -> Callable[..., None]:
    method = getattr(owner, name, None)
    if method is None:
        raise SCXUnsupportedError(
            f"this vLLM has no {owner.__name__}.{name}, without which a model could run "
            "plain unseen: use a version that scx-vllm names, or keep it from loading "
            "this plugin (VLLM_PLUGINS)"
        )
    return method


def require_encoded(vllm_config: Any, worker: Any) -> None:
    """Raise SCXNotEncodedError unless a worker's model encodes what was asked for.

    Asked for by the variables of this process, or by the record of the process that
    configured the engine. Without either nothing is looked at.
    """
    record, config = record_of(vllm_config), get_scx_config()
    if record is None and not config.enabled:
        return
    model = worker.get_model()
    if record and isinstance(model, EncodedModel) and model.encodes(record["layers"]):
        return
    layers, loaded = record["layers"] if record else config.enc_layers, type(model)
    raise SCXNotEncodedError(
        f"layers {layers} were to be encoded, but {loaded.__module__}."
        f"{loaded.__name__} was loaded, which does not encode them: leave out what "
        f"chose that class (a plugin, a loader, an override), or unset {ENC_LAYERS}"
    )


def require_alike(store: Any, rank: int, ranks: int, record: Any) -> None:
    """Raise SCXNotEncodedError unless all ranks of an engine encode the same.

    The ranks of one node have one configuration, and one record of what is encoded. Each
    node of several makes its own from its own variables. So every rank leaves its record
    in `store`, torch's key-value store of the process group, and one that encodes looks
    at all others. A rank that encodes nothing waits for none: its node may lack this
    package.
    """
    shared = record and {k: v for k, v in record.items() if k != "ranks_here"}
    ours = json.dumps(shared, sort_keys=True)
    store.set(f"scx/{rank}", ours)
    if not record:
        return
    ways_out = "give each node the same SCX_* variables and package"
    for other in range(ranks):
        try:
            store.wait([f"scx/{other}"], PATIENCE)
        except RuntimeError as error:
            raise SCXNotEncodedError(
                f"rank {other} does not say what it encodes: {ways_out}"
            ) from error
        theirs = store.get(f"scx/{other}").decode()
        if theirs != ours:
            raise SCXNotEncodedError(
                f"rank {other} encodes {theirs}, and rank {rank} {ours}: {ways_out}"
            )
