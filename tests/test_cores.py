"""Cores that are there, against made-up file systems, and how ranks share them."""

import os
from types import SimpleNamespace

import pytest

from lab.engines import in_new_process
from scx.kernels.host import cores
from scx.keys import SCXConfig
from scx.plugin.plan import EncodingPlan

V2 = "31 24 0:26 {top} /sys/fs/cgroup rw,nosuid - cgroup2 cgroup2 rw,nsdelegate\n"
# As systemd mounts version 1, with an optional field, and beside it what is no limit.
V1 = (
    "24 1 0:21 / / rw - ext4 /dev/sda rw\n"
    "25 24 0:22 / /mnt/\udce9\\040x rw - fuse.odd  rw\n"
    "32 24 0:27 {top} /sys/fs/cgroup/cpu,cpuacct rw shared:9 - cgroup cgroup "
    "rw,cpu,cpuacct\n"
    "33 24 0:28 / /sys/fs/cgroup/cpuset rw shared:10 - cgroup cgroup rw,cpuset\n"
)
SLICE = "sys/fs/cgroup/a.slice"


def quotas(root, files):
    for name, text in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text, errors="surrogateescape")
    return sorted(cores._quotas(root))


def v2(path, top="/", **limits):
    return {
        "proc/self/cgroup": f"0::{path}\n",
        "proc/self/mountinfo": V2.format(top=top),
        **{name: f"{text}\n" for name, text in limits.items()},
    }


def v1(path, quota, top="/", folder="sys/fs/cgroup/cpu,cpuacct"):
    return {
        "proc/self/cgroup": f"5:cpuset:/\n4:cpu,cpuacct:{path}\n1:name=a:/x\n0::/x\n",
        "proc/self/mountinfo": V1.format(top=top),
        f"{folder}/cpu.cfs_quota_us": f"{quota}\n",
        f"{folder}/cpu.cfs_period_us": "100000\n",
        # Of another controller, which says nothing of CPU time.
        "sys/fs/cgroup/cpuset/cpu.cfs_quota_us": "1000\n",
        "sys/fs/cgroup/cpuset/cpu.cfs_period_us": "100000\n",
    }


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        ({}, []),
        ({"proc/self/cgroup": "0::/\n"}, []),
        ({"proc/self/mountinfo": V2.format(top="/")}, []),
        # A container with a cgroup namespace: its own group is the root.
        (v2("/", **{"sys/fs/cgroup/cpu.max": "250000 100000"}), [2.5]),
        (v2("/", **{"sys/fs/cgroup/cpu.max": "max 100000"}), []),
        # All ancestors count.
        (
            v2(
                "/a.slice/b.scope",
                **{
                    f"{SLICE}/b.scope/cpu.max": "max 100000",
                    f"{SLICE}/cpu.max": "400000 50000",
                    f"{SLICE}/c.scope/cpu.max": "1000 100000",
                },
            ),
            [8],
        ),
        # A container without one: what is mounted is a part of the tree.
        (
            v2(
                "/docker/1/x", "/docker/1", **{"sys/fs/cgroup/x/cpu.max": "300000 100000"}
            ),
            [3],
        ),
        # What is mounted is not above this process: its top is all that is seen.
        (v2("/", "/../..", **{"sys/fs/cgroup/cpu.max": "150000 100000"}), [1.5]),
        (v2("/gone (deleted)", **{"sys/fs/cgroup/cpu.max": "100000 100000"}), [1]),
        (v1("/", -1), []),
        (v1("/", 350000), [3.5]),
        (v1("/kube/pod", 200000, folder="sys/fs/cgroup/cpu,cpuacct/kube"), [2]),
        (v1("/docker/1", 600000, top="/docker/1"), [6]),
    ],
)
def test_cpu_quotas(files, expected, tmp_path):
    assert quotas(tmp_path, files) == expected


@pytest.mark.parametrize(
    ("affinity", "quota", "expected"),
    [(8, [], 8), (8, [3.9], 3), (8, [0.5], 1), (8, [32.0], 8), (8, [6.0, 2.0], 2)],
)
def test_the_least_of_affinity_and_quotas_counts(affinity, quota, expected, monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(affinity)))
    monkeypatch.setattr(cores, "_quotas", lambda _: iter(quota))
    assert cores.usable_cores() == expected


def test_the_cores_of_this_machine():
    assert 1 <= cores.usable_cores() <= len(os.sched_getaffinity(0))


def test_workers_in_proportion():
    counts = {1: 1, 2: 1, 3: 2, 4: 3, 8: 6, 12: 10, 16: 13, 32: 16, 192: 16}
    assert {n: cores.workers_for(n, 1) for n in counts} == counts
    assert [cores.workers_for(64, ranks) for ranks in (2, 4, 8)] == [16, 13, 6]


@pytest.mark.parametrize("ranks", [1, 2, 3, 8])
def test_workers_and_engines_are_never_more_than_the_cores(ranks):
    for count in range(2 * ranks, 256):
        workers = cores.workers_for(count, ranks)
        assert workers >= 1
        assert ranks * workers + ranks <= count


def count_ranks(settings):
    from vllm.config import ParallelConfig

    counts = []
    for each in settings:
        config = ParallelConfig(distributed_executor_backend="mp", **each)
        counts.append(cores.ranks_here(config))
    config.data_parallel_size_local = 0
    return counts, cores.ranks_here(config)


def test_all_ranks_of_this_machine_count():
    replicas = {"data_parallel_size": 4, "data_parallel_size_local": 2}
    grid = {"tensor_parallel_size": 4, "pipeline_parallel_size": 2}
    settings = [{}, grid, replicas, replicas | grid, grid | {"nnodes": 2}]
    counts, servers_alone = in_new_process(count_ranks, settings)
    assert counts == [1, 8, 2, 16, 4]
    assert servers_alone == 8


@pytest.mark.parametrize(("by_hand", "workers"), [(None, 5), (2, 2), (40, 40)])
def test_threads_by_hand_are_those_of_each_rank(by_hand, workers, monkeypatch):
    monkeypatch.setattr(cores, "usable_cores", lambda: 14)
    config = SCXConfig((0,), "cpu", False, None, host_threads=by_hand)
    plan = SimpleNamespace(config=config, record={"ranks_here": 2})
    assert EncodingPlan.workers.fget(plan) == workers
