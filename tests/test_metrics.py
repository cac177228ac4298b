"""What an operator sees of encoded layers, without an engine."""

import gc
import logging

import pytest
from prometheus_client import REGISTRY

from scx.devices import metrics
from scx.devices.plain import Traffic


class Layer:
    """What a Reporter sees of a secure layer."""

    def __init__(self, seconds=0.0):
        self.traffic = Traffic(secure_seconds=seconds)

    def step(self):
        self.traffic.steps += 1
        self.traffic.crossings += 6
        self.traffic.bytes_in += 2**20
        self.traffic.bytes_out += 2**21


@pytest.fixture
def log(caplog, monkeypatch):
    # Once vLLM is there, its root logger hands nothing on.
    monkeypatch.setattr(metrics.logger, "propagate", False)
    metrics.logger.addHandler(caplog.handler)
    with caplog.at_level(logging.INFO, metrics.logger.name):
        yield caplog
    metrics.logger.removeHandler(caplog.handler)


def value(name):
    return REGISTRY.get_sample_value(f"scx_{name}") or 0


def test_a_report_is_the_difference_to_the_last_one(log):
    layers = [Layer(), Layer()]
    reporter = metrics.Reporter(layers, 10)
    before = {name: value(f"{name}_total") for name in metrics.HELP}
    for _ in range(2):
        for layer in layers:
            layer.step()
            layer.traffic.secure_seconds += 0.25
        log.clear()
        reporter.report()
        (message,) = log.messages
        assert message == (
            "SCX, 2 layers: 2 layer steps, 12 crossings, 2.0 MiB in, 4.0 MiB out, "
            "500.0 ms on the secure device"
        )
    done = {name: value(f"{name}_total") - before[name] for name in metrics.HELP}
    assert done == {
        "steps": 4,
        "crossings": 24,
        "bytes_in": 4 * 2**20,
        "bytes_out": 8 * 2**20,
        "secure_seconds": 1.0,
    }


def test_nothing_is_logged_where_nothing_ran(log):
    layers = [Layer()]
    metrics.Reporter(layers, 10).report()
    assert not log.messages


def test_what_is_not_measured_is_not_reported(log):
    layers = [Layer(seconds=None)]
    before = value("secure_seconds_total")
    layers[0].step()
    metrics.Reporter(layers, 10).report()
    assert log.messages == [
        "SCX, 1 layers: 1 layer steps, 6 crossings, 1.0 MiB in, 2.0 MiB out"
    ]
    assert value("secure_seconds_total") == before


def test_a_reporter_ends_with_its_layers(log):
    layers = [Layer(), Layer()]
    before = value("encoded_layers")
    metrics.count_layers(layers)
    reporter = metrics.Reporter(layers, 0.01)
    reporter.start()
    assert value("encoded_layers") == before + 2
    layers[0].step()
    layers.clear()
    gc.collect()
    reporter.join(10)
    assert not reporter.is_alive()
    assert value("encoded_layers") == before
