"""Where the host device's threads and memory go on a machine of several nodes."""

import os
import threading
from types import SimpleNamespace

import pytest
import torch

from scx.devices import numa

GPU = "0000:81:00.0"


def machine(root, node, cpulist="0-1,8,16-17"):
    """The kernel's files of a machine whose accelerator is on that node."""
    device = root / "sys/bus/pci/devices" / GPU
    device.mkdir(parents=True)
    (device / "numa_node").write_text(f"{node}\n")
    folder = root / "sys/devices/system/node/node1"
    folder.mkdir(parents=True)
    (folder / "cpulist").write_text(f"{cpulist}\n")
    return root


def test_the_cores_of_a_node(tmp_path):
    assert numa.node_cores(GPU, machine(tmp_path, 1)) == {0, 1, 8, 16, 17}


@pytest.mark.parametrize("node", [-1, 2])
def test_a_node_that_is_not_known(node, tmp_path):
    assert numa.node_cores(GPU, machine(tmp_path, node)) == frozenset()
    assert numa.node_cores("0000:01:00.0", tmp_path) == frozenset()


@pytest.mark.parametrize(
    ("cpulist", "near"), [("1", {1}), ("99", {0, 1}), ("0-7", {0, 1})]
)
def test_cores_that_may_not_be_used_are_left_out(cpulist, near, tmp_path, monkeypatch):
    """Of two, on a node with those in `cpulist`."""
    machine(tmp_path, 1, cpulist)
    found = SimpleNamespace(pci_domain_id=0, pci_bus_id=0x81, pci_device_id=0)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: found)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0, 1})
    monkeypatch.setattr(numa, "Path", lambda _: tmp_path)
    assert numa.cores_near(torch.device("cuda:0")) == near


def test_a_thread_comes_back_to_its_cores():
    before = os.sched_getaffinity(0)
    with numa.running_on({min(before)}):
        assert os.sched_getaffinity(0) == {min(before)}
    assert os.sched_getaffinity(0) == before


def test_other_threads_stay_where_they_are():
    seen = []
    inside, looked = threading.Event(), threading.Event()

    def look():
        inside.wait()
        seen.append(os.sched_getaffinity(0))
        looked.set()

    thread = threading.Thread(target=look)
    thread.start()
    before = os.sched_getaffinity(0)
    with numa.running_on({min(before)}):
        inside.set()
        looked.wait()
    thread.join()
    assert seen == [before]
