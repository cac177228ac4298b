"""How many cores there are, and how many of them the workers of one rank get.

Nothing here imports vLLM or torch.
"""

import os
import re
from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from typing import Any

MAX_WORKERS = 16
CORES_PER_SPARE = 8
"""One core in this many is left to servers, tokenizers and schedulers."""


def usable_cores() -> int:
    """Cores that this process may use, at least 1.

    Those of its affinity (which cpusets and taskset narrow), or fewer if a CPU quota
    of its cgroups, of version 1 or 2, allows fewer; a part of a core is not
    counted. Only what is mounted here is seen: a quota above a container's own
    root is not.
    """
    cores = len(os.sched_getaffinity(0))
    return max(1, int(min([cores, *_quotas(Path("/"))])))


def workers_for(cores: int, ranks: int) -> int:
    """Worker threads for one of `ranks` ranks that share `cores` cores: 1 to 16.

    Each rank keeps a core for its engine's own thread. Together they are no more than
    the cores, but for a machine that has fewer than two cores for each rank.
    """
    shared = cores - cores // CORES_PER_SPARE
    return max(1, min(MAX_WORKERS, shared // ranks - 1))


def ranks_here(parallel_config: Any) -> int:
    """Ranks of this engine on this machine, from a vllm.config.ParallelConfig.

    Tensor, pipeline and context parallel ones of this node, times the local
    data-parallel replicas, as vLLM counts them itself (MultiprocExecutor._init_executor
    in v1/executor/multiproc_executor.py). Call it in the process that makes the
    configuration: a replica's own process forgets the others (v1/engine/core.py,
    run_engine_core).

    Two things cannot be known. Ranks that Ray or an external launcher puts on other
    machines are counted as if they were here, so workers may be fewer than cores allow.
    Engines that were launched separately are not counted: give each its own cores by
    taskset or a cgroup.
    """
    replicas = parallel_config.data_parallel_size_local
    if replicas == 0:
        # A node that runs servers alone; vLLM would divide by it to count nodes.
        return parallel_config.world_size
    # A replica that was launched by itself knows its number at least.
    last = (parallel_config.data_parallel_rank_local or 0) + 1
    return parallel_config.local_world_size * max(replicas, last)


def _quotas(root: Path) -> Iterator[float]:
    """The cores that each CPU quota above this process allows, under that root folder."""
    for folder in _cpu_cgroups(root):
        text = _read(folder / "cpu.max") or (
            _read(folder / "cpu.cfs_quota_us") + _read(folder / "cpu.cfs_period_us")
        )
        # Without a limit the first is `max`, or -1.
        if limit := re.match(r"(\d+)\s+(\d+)", text):
            yield int(limit[1]) / int(limit[2])


def _cpu_cgroups(root: Path) -> Iterator[Path]:
    """The folders of this process's cgroups that can limit CPU time, ancestors too."""
    memberships = {}
    for line in _read(root / "proc/self/cgroup").splitlines():
        _, controllers, path = line.split(":", 2)
        memberships |= dict.fromkeys(controllers.split(","), path)
    for line in _read(root / "proc/self/mountinfo").splitlines():
        # proc_pid_mountinfo(5). A mount's source, before its options, may be empty.
        mount, _, filesystem = line.partition(" - ")
        kind, *_, options = filesystem.split()
        controller = {"cgroup": "cpu", "cgroup2": ""}.get(kind)
        if controller not in memberships or (
            controller and controller not in options.split(",")
        ):
            continue
        top, point = mount.split()[3:5]
        mounted = root / point.lstrip("/")
        path = PurePosixPath(memberships[controller])
        # What is mounted may be a part of the tree, such as a container's own.
        below = path.relative_to(top) if path.is_relative_to(top) else PurePosixPath()
        yield from (mounted / each for each in (below, *below.parents))


def _read(file: Path) -> str:
    try:
        return file.read_text(errors="surrogateescape")
    except OSError:
        return ""
