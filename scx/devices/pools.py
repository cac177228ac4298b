"""Memory of the accelerator that vLLM's sleep mode leaves alone.

vLLM loads a model inside a memory pool whose content sleep mode copies to the host, or
drops, and then reads back or leaves undefined. An undefined key would be a known one, and
a counter that begins again would draw row orders that were drawn before.
"""

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

import torch

from scx.errors import SCXUnsupportedError

_Built = TypeVar("_Built")


def built_outside(build: Callable[[], _Built], accelerator: torch.device) -> _Built:
    """What `build` returns, whose memory on `accelerator` is in no pool.

    A pool takes what the thread that entered it allocates (torch.cuda.use_mem_pool), so
    another thread builds. Raises SCXUnsupportedError if a pool takes that as well.
    """

    def run() -> _Built:
        with torch.accelerator.device_index(accelerator.index):
            if accelerator.type == "cuda":
                _require_outside(torch.empty(1, device=accelerator))
            return build()

    with ThreadPoolExecutor(1) as thread:
        return thread.submit(run).result()


def _require_outside(tensor: torch.Tensor) -> None:
    address = tensor.data_ptr()
    for segment in torch.cuda.memory_snapshot():
        inside = 0 <= address - segment["address"] < segment["total_size"]
        if inside and segment["segment_pool_id"] != (0, 0):
            raise SCXUnsupportedError(
                "this torch puts the memory of every thread in the pool that sleep mode "
                "discards, keys and counters of the secure device too: use a version "
                "that was run"
            )
