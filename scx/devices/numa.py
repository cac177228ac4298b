"""Which of the host's cores are near an accelerator.

On a machine of several NUMA nodes each accelerator hangs on one of them. Memory of
another node costs every row a second hop. In a virtual machine the kernel may not know
the node; then all cores are equally near.
"""

import os
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch


def cores_near(accelerator: torch.device) -> frozenset[int]:
    """The cores of the accelerator's node that this process may use.

    All that it may use if the node is not known, or if it may use none of it: a user, or
    vLLM's --numa-bind, has then decided otherwise.
    """
    usable = frozenset(os.sched_getaffinity(0))
    if accelerator.type != "cuda":
        return usable
    found = torch.cuda.get_device_properties(accelerator)
    address = (
        f"{found.pci_domain_id:04x}:{found.pci_bus_id:02x}:{found.pci_device_id:02x}.0"
    )
    return usable & node_cores(address, Path("/")) or usable


def node_cores(address: str, root: Path) -> frozenset[int]:
    """The cores of a PCI device's node as the kernel's files under `root` say; none if
    they do not."""
    try:
        node = int((root / f"sys/bus/pci/devices/{address}/numa_node").read_text())
        text = (root / f"sys/devices/system/node/node{node}/cpulist").read_text()
    except (OSError, ValueError):
        return frozenset()
    cores: set[int] = set()
    for part in text.strip().split(","):
        first, _, last = part.partition("-")
        cores.update(range(int(first), int(last or first) + 1))
    return frozenset(cores)


@contextmanager
def running_on(cores: Collection[int]) -> Iterator[None]:
    """Hold this thread on those cores. The kernel gives it memory of their node."""
    before = os.sched_getaffinity(0)
    os.sched_setaffinity(0, cores)
    try:
        yield
    finally:
        os.sched_setaffinity(0, before)
