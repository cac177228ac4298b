"""What the encoded layers did, for an operator: Prometheus metrics and a log line.

The layers are in a worker process, and vLLM answers /metrics in another one. It
shows the metrics of all its processes if PROMETHEUS_MULTIPROC_DIR names an
empty folder at start (vllm/v1/metrics/prometheus.py); the log line needs nothing.
"""

import functools
import logging
import threading
import weakref
from collections.abc import Sequence
from typing import Any

from prometheus_client import Counter, Gauge

from scx.devices.interface import SecureLayer, Traffic

# Under vLLM's root logger, so that its handlers and levels apply.
logger = logging.getLogger("vllm.scx")

HELP = {
    "steps": "Forward passes of encoded layers, profiling and warm-up included.",
    "crossings": "Times that execution passed from one device to the other.",
    "bytes_in": "Bytes that the secure device received.",
    "bytes_out": "Bytes that the accelerator received.",
    "secure_seconds": "Seconds of secure-device work, overlapping transfers included.",
}
"""The counters, by their names in Traffic."""


# Made on first use, once per process: a process may see several engines.
@functools.cache
def _counter(name: str) -> Counter:
    return Counter(f"scx_{name}", HELP[name])


@functools.cache
def _encoded_layers() -> Gauge:
    return Gauge(
        "scx_encoded_layers",
        "Encoded layers, each counted once in every rank that holds a part of it.",
        multiprocess_mode="livesum",
    )


def count_layers(layers: Sequence[SecureLayer]) -> None:
    """Show that these secure layers are there, for as long as the first one is."""
    _encoded_layers().inc(len(layers))
    weakref.finalize(layers[0], _encoded_layers().dec, len(layers))


class Reporter(threading.Thread):
    """Reports what secure layers did, until they or the interpreter end.

    It keeps no layer alive. A thread does not survive a fork, so it is started
    in the process where the layers run.
    """

    def __init__(self, layers: Sequence[SecureLayer], interval: float) -> None:
        """`layers` have a `traffic` that can be read at any time; `interval` is in
        seconds."""
        super().__init__(name="scx-metrics", daemon=True)
        self._layers = [weakref.ref(layer) for layer in layers]
        self._interval = interval
        self._reported = dict.fromkeys(HELP, 0)
        self._ended = threading.Event()
        weakref.finalize(layers[0], self._ended.set)

    def run(self) -> None:
        while not self._ended.wait(self._interval):
            self.report()

    def report(self) -> None:
        """Count what was done since the last report, and log it if anything was."""
        layers = [layer for ref in self._layers if (layer := ref()) is not None]
        if len(layers) < len(self._layers):
            return
        totals = _total([layer.traffic for layer in layers])
        done = {name: total - self._reported[name] for name, total in totals.items()}
        self._reported.update(totals)
        for name, amount in done.items():
            _counter(name).inc(amount)
        if done["steps"]:
            logger.info("SCX, %d layers: %s", len(layers), _as_text(done))


def _total(traffics: Sequence[Traffic]) -> dict[str, Any]:
    """Sums over layers, without what is not measured."""
    values = {name: [getattr(traffic, name) for traffic in traffics] for name in HELP}
    return {name: sum(each) for name, each in values.items() if None not in each}


def _as_text(done: dict[str, Any]) -> str:
    text = (
        f"{done['steps']} layer steps, {done['crossings']} crossings, "
        f"{done['bytes_in'] / 2**20:.1f} MiB in, {done['bytes_out'] / 2**20:.1f} MiB out"
    )
    if "secure_seconds" in done:
        text += f", {done['secure_seconds'] * 1e3:.1f} ms on the secure device"
    return text
