"""Sealed tiers under vLLM's own tiering manager, over host memory."""

import time
from dataclasses import dataclass
from types import SimpleNamespace

import numpy as np
from vllm.v1.kv_offload.base import LookupResult, ReqContext, make_offload_key
from vllm.v1.kv_offload.config import (
    OffloadingCacheConfig,
    OffloadingConfig,
    OffloadingGroupConfig,
    OffloadingModelConfig,
    OffloadingParallelConfig,
)
from vllm.v1.kv_offload.tiering.factory import SecondaryTierFactory
from vllm.v1.kv_offload.tiering.manager import (
    CPUPrimaryTierOffloadingManager,
    TieringOffloadingManager,
)

FACTS = {"model": "abcd", "dtype": "bfloat16", "cache_dtype": "auto", "encoding": None}
BLOCK_BYTES, CHUNKS = 4096, 16
SECONDS = 20


def keys(*numbers):
    return [make_offload_key(bytes([number]) * 32, 0) for number in numbers]


def offloading_config(rank=0, tp_size=1):
    return OffloadingConfig(
        groups=(OffloadingGroupConfig(16, ("layers.0", "layers.1"), 0),),
        worker_kv_bytes_per_block=BLOCK_BYTES,
        enable_kv_cache_events=False,
        extra_config={},
        engine_id="tests",
        model=OffloadingModelConfig("model", "bfloat16"),
        cache=OffloadingCacheConfig(16, 1),
        parallel=OffloadingParallelConfig(
            rank, tp_size, tp_size, 1, 1, 1, 0, 1, None, False
        ),
    )


@dataclass
class Engine:
    """As much of an engine as sealing needs; `memory` is its primary tier."""

    manager: TieringOffloadingManager
    memory: np.ndarray
    count: int = 0

    def request(self, tenant=None):
        self.count += 1
        params = None if tenant is None else {"scx_tenant": tenant}
        request = ReqContext(f"request {self.count}", kv_transfer_params=params)
        self.manager.on_new_request(request)
        return request

    def step(self):
        self.manager.on_schedule_end(
            SimpleNamespace(new_req_ids=(), preempted_req_ids=())
        )
        time.sleep(0.002)

    def settle(self):
        self.step()
        self.manager.secondary_tiers[0].drain_jobs()
        self.manager._process_finished_jobs()

    def store(self, blocks, tenant=None):
        """Blocks, by key, as a GPU would write them, and then to the tier."""
        request = self.request(tenant)
        made = self.manager.prepare_store(list(blocks), request)
        for key, chunk in zip(made.keys_to_store, made.store_spec.chunk_ids, strict=True):
            self.memory[chunk] = np.frombuffer(blocks[key], np.uint8)
        self.manager.complete_store(made.keys_to_store, request)
        self.settle()
        self.manager.on_request_finished(request)

    def load(self, wanted, tenant=None):
        """What the tier gives for each key: its bytes, or None for a miss."""
        request, deadline = self.request(tenant), time.monotonic() + SECONDS
        while (
            LookupResult.RETRY
            in (answers := [self.manager.lookup(key, request) for key in wanted])
            or LookupResult.HIT_PENDING in answers
        ):
            assert time.monotonic() < deadline, answers
            self.settle()
        hits = [k for k, a in zip(wanted, answers, strict=True) if a is LookupResult.HIT]
        found = dict.fromkeys(wanted)
        if hits:
            spec = self.manager.prepare_load(hits, request)
            for key, chunk in zip(hits, spec.chunk_ids, strict=True):
                found[key] = self.memory[chunk].tobytes()
            self.manager.complete_load(hits, request)
        self.manager.on_request_finished(request)
        return list(found.values())

    def counts(self):
        stats = self.manager.secondary_tiers[0].get_stats()
        values = stats.data["data"] if stats else {}
        return {name: value[()] for name, value in values.items()}

    def stop(self):
        self.manager.secondary_tiers[0].shutdown()


def start(folder, facts=FACTS, rank=0, tp_size=1, **settings):
    """An engine with empty memory on `folder`; SCX_KEY_FILE is the environment's."""
    memory = np.zeros((CHUNKS, BLOCK_BYTES), np.uint8)
    region = SimpleNamespace(create_kv_memoryview=lambda: memoryview(memory))
    primary = CPUPrimaryTierOffloadingManager(CHUNKS, region)
    tier = SecondaryTierFactory.create_secondary_tier(
        {"type": "sealed", "module_path": "scx.sealed", "path": str(folder)}
        | {"facts": facts}
        | settings,
        primary.get_kv_memoryview(),
        SimpleNamespace(config=offloading_config(rank, tp_size)),
    )
    return Engine(TieringOffloadingManager(primary, [tier]), memory)
