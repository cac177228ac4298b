"""What trips to the host cost on a machine."""

import math
from dataclasses import dataclass


@dataclass(frozen=True)
class Machine:
    """What a trip costs, on each rank."""

    hop_seconds: float
    """An empty trip."""
    flag_seconds: float
    """One chunk of rows."""
    bus_bytes_per_second: float
    """In each direction while both are in use."""
    core_bytes_per_second: float
    """What one worker encodes."""
    workers: int

    @property
    def bytes_per_second(self) -> float:
        return min(self.bus_bytes_per_second, self.workers * self.core_bytes_per_second)


H100 = Machine(
    hop_seconds=9.3e-6,
    flag_seconds=0.3e-6,
    bus_bytes_per_second=40e9,
    core_bytes_per_second=5.5e9,
    workers=13,
)
"""Measured with 16 cores and PCIe 5."""


def host_limit(machine: Machine) -> str | None:
    """What to say where workers are too few for the bus."""
    needed = math.ceil(machine.bus_bytes_per_second / machine.core_bytes_per_second)
    if machine.workers >= needed:
        return None
    speed, bus = machine.bytes_per_second / 1e9, machine.bus_bytes_per_second / 1e9
    return (
        f"the host's cores are the limit of long steps: {machine.workers} workers encode "
        f"{speed:.0f} GB/s where the bus carries {bus:.0f}; {needed} workers would not be"
    )
