"""Says in the log which layer waits while a secure device does not answer, and why."""

import logging
import threading
import time
import weakref
from collections.abc import Mapping

from scx.devices.interface import SecureLayer

PATIENCE = 10.0
"""Seconds: less than an accelerator's kernel waits for the host before it gives up."""

# vLLM's logger of the same name, whose handlers and levels apply.
_logger = logging.getLogger("vllm.scx")


def watch(layers: Mapping[int, SecureLayer], patience: float = PATIENCE) -> None:
    """Watch secure layers, by index, from a thread that ends when they are gone.

    One line is logged if a call takes longer than `patience` seconds, and again each
    time that passes. The call goes on: a step cannot be taken back from another device.
    """
    threading.Thread(
        target=_watch,
        args=(weakref.WeakValueDictionary(layers), patience),
        name="scx-watchdog",
        daemon=True,
    ).start()


def _watch(
    layers: "weakref.WeakValueDictionary[int, SecureLayer]", patience: float
) -> None:
    while layers:
        time.sleep(patience)
        _report(layers, patience)


def _report(layers: Mapping[int, SecureLayer], patience: float) -> None:
    now = time.monotonic()
    for index, layer in layers.items():
        since = layer.busy_since
        if since is not None and now - since > patience:
            _logger.error(
                "SCX layer %d: the secure device %s has not answered for %.0f seconds%s",
                index,
                layer.device,
                now - since,
                f": {layer.failure}" if layer.failure else "",
            )
