"""The manager that vLLM drives: from host memory to sealed files and back, on threads.

Names of vLLM that this leans on are listed, with versions, in docs/vllm-seams.md.
"""

import json
import logging
import threading
from collections import Counter
from collections.abc import Iterable, Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from typing_extensions import override
from vllm.distributed.kv_transfer.kv_connector.v1.offloading.metrics import (
    OffloadingConnectorStats,
)
from vllm.v1.kv_offload.base import (
    LookupResult,
    Medium,
    OffloadingCounterMetadata,
    OffloadingMetricMetadata,
    OffloadKey,
    ReqContext,
    RequestOffloadingContext,
    ScheduleEndContext,
)
from vllm.v1.kv_offload.tiering.async_lookup import AsyncLookupManager
from vllm.v1.kv_offload.tiering.base import (
    JobId,
    JobResult,
    SecondaryTierManager,
    TransferJob,
)
from vllm.v1.kv_offload.tiering.fs.thread_pool import DualQueueThreadPool

from scx.errors import SCXConfigError
from scx.keys import KEY_FILE, RootKey, get_scx_config
from scx.sealed.format import OVERHEAD, RefusedError, Seal, context_of
from scx.sealed.store import Store

if TYPE_CHECKING:
    from vllm.v1.kv_offload.base import OffloadingSpec
    from vllm.v1.kv_offload.config import OffloadingConfig
    from vllm.v1.kv_offload.tiering.backpressure import BackpressureDetector

_logger = logging.getLogger("vllm.scx")

TENANT = "scx_tenant"
"""The name in a request's kv_transfer_params of whom its KV belongs to."""
METRICS = {
    "sealed": "scx_kv_sealed_blocks",
    "opened": "scx_kv_opened_blocks",
    "refused": "scx_kv_refused_blocks",
    "failed": "scx_kv_failed_blocks",
}
_HELP = {
    "sealed": "Blocks sealed and stored.",
    "opened": "Blocks loaded and found authentic.",
    "refused": "Blocks whose file was not authentic: a miss, and the file is removed.",
    "failed": "Blocks whose file could not be read or written: a miss.",
}


@dataclass
class _Job:
    """A transfer under way. Its thread appends the keys of the blocks that it moved."""

    seal: Seal
    blocks: dict[OffloadKey, memoryview]
    is_load: bool
    moved: list[OffloadKey] = field(default_factory=list)


class _Names(AsyncLookupManager):
    """Asks, on a thread of its own, which names the store has."""

    def __init__(self, store: Store, tier_type: str) -> None:
        super().__init__(tier_type)
        self._store = store

    @override
    def batch_lookup(
        self, keys: list[OffloadKey], req_context: ReqContext
    ) -> Iterable[bool]:
        return [self._store.has(key.decode()) for key in keys]


class SealedTier(SecondaryTierManager):
    """A folder of sealed blocks, as {"type": "sealed", "path": FOLDER}.

    The folder may be shared by engines, with any keys. Whatever is wrong with a file or
    with the disk is a miss, counted, and logged the first time.
    """

    medium: ClassVar[Medium | None] = Medium.STORAGE

    def __init__(
        self,
        offloading_spec: "OffloadingSpec",
        primary_kv_view: memoryview,
        tier_type: str,
        path: str,
        facts: Mapping[str, Any] | None = None,
        max_bytes: int | None = None,
        fsync: bool = False,
        n_read_threads: int = 4,
        n_write_threads: int = 4,
        backpressure_detector: "BackpressureDetector | None" = None,
    ) -> None:
        """`facts` are what this package's plugin adds: the model and how it is encoded.

        Raises SCXConfigError without them or without a key file, and OSError for a
        folder that cannot be made.
        """
        super().__init__(
            offloading_spec, primary_kv_view, tier_type, backpressure_detector
        )
        config = get_scx_config()
        if facts is None or config.key_file is None:
            raise SCXConfigError(
                f"a sealed tier needs {KEY_FILE}, and the plugin of this package in the "
                "process that configures the engine (see VLLM_PLUGINS)"
            )
        self._root = RootKey.load(config).for_model(facts["model"])
        self._context = context_of({**facts, **_layout(offloading_spec.config)})
        self._view = primary_kv_view.cast("B")
        self._store = Store(Path(path), max_bytes, fsync)
        self._pool = DualQueueThreadPool(n_read_threads, n_write_threads, "scx_sealed")
        self._names = _Names(self._store, tier_type)
        self._jobs: dict[JobId, _Job] = {}
        self._lock = threading.Lock()
        self._counts: Counter[str] = Counter()
        self._logged: set[str] = set()

    @override
    def on_new_request(self, req_context: ReqContext) -> RequestOffloadingContext:
        return RequestOffloadingContext()

    @override
    def lookup(self, key: OffloadKey, req_context: ReqContext) -> LookupResult:
        # By name, since vLLM's cache of answers is shared by all tenants.
        name = self._seal(req_context).name(key)
        found = self._names.lookup(OffloadKey(name.encode()), req_context)
        if found is None:
            return LookupResult.RETRY
        return LookupResult.HIT if found else LookupResult.MISS

    @override
    def submit_store(self, job_metadata: TransferJob) -> None:
        job = self._jobs[job_metadata.job_id] = self._job(job_metadata)
        self._pool.enqueue_store(job_metadata.job_id, 1, [partial(self._store_all, job)])

    @override
    def submit_load(self, job_metadata: TransferJob) -> None:
        job = self._jobs[job_metadata.job_id] = self._job(job_metadata)
        self._pool.enqueue_load(job_metadata.job_id, 1, [partial(self._load_all, job)])

    @override
    def get_finished_jobs(self) -> Iterable[JobResult]:
        return [
            self._result(job_id, self._jobs.pop(job_id), seconds)
            for job_id, _, seconds in self._pool.get_finished()
        ]

    @override
    def drain_jobs(self) -> None:
        self._pool.wait_idle()

    @override
    def on_schedule_end(self, context: ScheduleEndContext) -> None:
        self._names.flush()

    @override
    def on_request_finished(self, req_context: ReqContext) -> None:
        self._names.cleanup(req_context.req_id)

    @override
    def shutdown(self) -> None:
        self._names.shutdown()
        self._pool.shutdown()
        self._view.release()

    @classmethod
    @override
    def build_metric_definitions(
        cls, extra_config: dict[str, Any]
    ) -> dict[str, OffloadingMetricMetadata]:
        return {
            METRICS[kind]: OffloadingCounterMetadata(documentation=text)
            for kind, text in _HELP.items()
        }

    @override
    def get_stats(self) -> OffloadingConnectorStats | None:
        with self._lock:
            counts, self._counts = self._counts, Counter()
        stats = OffloadingConnectorStats()
        for kind, count in counts.items():
            stats.increase_counter(METRICS[kind], count)
        return stats if counts else None

    def _seal(self, request: ReqContext) -> Seal:
        """That of the request's tenant, which stays with the request."""
        if (seal := request.get_state(Seal)) is None:
            tenant = (request.kv_transfer_params or {}).get(TENANT)
            # Whatever JSON it is, so that no request is without a tenant by mistake.
            spelled = None if tenant is None else json.dumps(tenant, sort_keys=True)
            seal = Seal(self._root, self._context, spelled)
            request.set_state(seal)
        return seal

    def _job(self, transfer: TransferJob) -> _Job:
        size = self.block_size_bytes
        starts = [int(chunk) * size for chunk in transfer.chunk_ids]
        blocks = [self._view[start : start + size] for start in starts]
        return _Job(
            self._seal(transfer.req_context),
            dict(zip(transfer.keys, blocks, strict=True)),
            transfer.is_promotion,
        )

    def _store_all(self, job: _Job) -> None:
        for key, block in job.blocks.items():
            name = job.seal.name(key)
            try:
                if self._store.has(name):
                    self._store.touch(name)
                else:
                    size = len(block) + OVERHEAD
                    self._store.write(name, job.seal.seal(key, block), size)
                    self._count("sealed")
                job.moved.append(key)
            except OSError as error:
                self._count("failed", f"not stored: {error.strerror}")

    def _load_all(self, job: _Job) -> None:
        for key, block in job.blocks.items():
            name = job.seal.name(key)
            try:
                with self._store.open(name) as file:
                    job.seal.open(key, file, block)
                self._count("opened")
                job.moved.append(key)
            except OSError as error:
                self._count("failed", f"not loaded: {error.strerror}")
            except RefusedError as error:
                self._count("refused", f"refused: {error}")
                # A miss as long as it stays, so a failure is one too.
                with suppress(OSError):
                    self._store.remove(name)

    def _result(self, job_id: JobId, job: _Job, seconds: float) -> JobResult:
        success = len(job.moved) == len(job.blocks)
        if job.is_load and not success:
            lost = job.blocks.keys() - set(job.moved)
            self._names.mark_miss([OffloadKey(job.seal.name(k).encode()) for k in lost])
        return JobResult(
            job_id,
            success,
            successful_keys=tuple(job.moved) if job.is_load and not success else None,
            transfer_time=seconds,
            transfer_bytes=len(job.moved) * self.block_size_bytes,
        )

    def _count(self, kind: str, reason: str = "") -> None:
        with self._lock:
            self._counts[kind] += 1
            first = bool(reason) and reason not in self._logged
            self._logged.add(reason)
        if first:
            _logger.warning(
                "SCX: a block of the sealed tier was %s; it is a miss, and further ones "
                "are counted in %s alone",
                reason,
                METRICS[kind],
            )


def _layout(config: "OffloadingConfig") -> dict[str, Any]:
    """What decides where the bytes of a block lie."""
    parallel = asdict(config.parallel)
    sizes = ("rank", "world_size", "tp_size", "pp_size", "pcp_size", "dcp_size")
    return {
        "groups": [asdict(group) for group in config.groups],
        "cache": asdict(config.cache),
        "parallel": {name: parallel[name] for name in sizes},
        "replicated": config.replicated_layout,
        "canonical": config.canonical_layout,
        "kv_cache_layout": config.kv_cache_layout,
    }
