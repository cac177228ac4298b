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
    inside one another thread builds. Raises SCXUnsupportedError if the pool takes that as
    well.
    """
    if not _is_pooled(accelerator):
        return build()

    def run() -> _Built:
        with torch.accelerator.device_index(accelerator.index):
            if _is_pooled(accelerator):
                raise SCXUnsupportedError(
                    "this torch puts the memory of every thread in the pool that sleep "
                    "mode discards, keys and counters of the secure device too: use a "
                    "version that was run"
                )
            return build()

    with ThreadPoolExecutor(1) as thread:
        return thread.submit(run).result()


def _is_pooled(accelerator: torch.device) -> bool:
    """Whether a pool takes what this thread allocates."""
    if accelerator.type != "cuda":
        return False
    probe = torch.empty(1, device=accelerator)
    return any(
        0 <= probe.data_ptr() - segment["address"] < segment["total_size"]
        for segment in torch.cuda.memory_snapshot()
        if segment["segment_pool_id"] != (0, 0)
    )
