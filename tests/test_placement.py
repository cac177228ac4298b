"""A secure device that would be an accelerator of the engine itself is refused."""

from types import SimpleNamespace

import pytest
import torch

from scx.devices import placement
from scx.errors import SCXUnsupportedError
from scx.keys import SCXConfig
from scx.plugin import refusals


def configuration(device_type="cuda", **parallel):
    world_size = parallel.get("world_size", 1)
    values = {
        "world_size": world_size,
        "local_world_size": world_size,
        "data_parallel_size_local": 1,
        "data_parallel_rank_local": None,
    }
    return SimpleNamespace(
        device_config=SimpleNamespace(device_type=device_type),
        parallel_config=SimpleNamespace(**(values | parallel)),
    )


def obstacles(secure, *device_type, **parallel):
    config = SCXConfig((0,), secure, False, None)
    return list(placement.obstacles(configuration(*device_type, **parallel), config))


@pytest.mark.parametrize(
    ("parallel", "ranks"),
    [
        ({}, 1),
        ({"world_size": 2}, 2),
        ({"world_size": 6}, 6),
        # Of two hosts with four ranks each.
        ({"world_size": 8, "local_world_size": 4}, 4),
        ({"world_size": 2, "data_parallel_size_local": 3}, 6),
        # A sentinel of vLLM's for ranks that are started elsewhere.
        ({"data_parallel_size_local": 0}, 1),
        # One process per rank: each knows the ranks before it.
        ({"world_size": 2, "data_parallel_rank_local": 2}, 6),
        ({"data_parallel_size_local": 4, "data_parallel_rank_local": 1}, 4),
        ({"assigned_physical_gpu_ids": None}, 1),
    ],
)
def test_accelerators_of_all_local_ranks_are_refused(parallel, ranks):
    for number in range(ranks):
        (line,) = obstacles(f"cuda:{number}", **parallel)
        assert line == (
            f"SCX_SECURE_DEVICE='cuda:{number}' is an accelerator of this engine, which "
            f"runs on cuda:0 to cuda:{ranks - 1}: use cpu, or a device from cuda:{ranks} "
            "on"
        )
    assert obstacles(f"cuda:{ranks}", **parallel) == []


def test_an_engine_is_refused_for_it_before_weights_load():
    vllm_config = configuration()
    vllm_config.lora_config = vllm_config.speculative_config = None
    config = SCXConfig((0,), "cuda:0", False, None)
    plan = SimpleNamespace(config=config)
    first = next(refusals.feature_obstacles(vllm_config, plan))
    assert [first] == obstacles("cuda:0")


@pytest.mark.parametrize("secure", ["cpu", "cpu:0", "cuda"])
def test_without_a_number_each_accelerator_is_its_own(secure):
    assert obstacles(secure, world_size=2) == []


def test_devices_of_another_type_are_others():
    assert obstacles("cuda:0", "cpu") == []
    assert obstacles("xpu:0", "cuda") == []
    assert len(obstacles("xpu:0", "xpu")) == 1


def test_accelerators_by_physical_number_are_refused_as_not_comparable():
    (line,) = obstacles("cuda:1", assigned_physical_gpu_ids=[1])
    assert "device_ids may choose SCX_SECURE_DEVICE='cuda:1'" in line
    assert "CUDA_VISIBLE_DEVICES" in line
    assert obstacles("cuda", assigned_physical_gpu_ids=[1]) == []


def test_a_rank_compares_with_the_accelerator_that_it_got():
    own = torch.device("cuda:2")
    with pytest.raises(SCXUnsupportedError, match="'cuda:2' is the accelerator of this"):
        placement.require_apart(torch.device("cuda:2"), own)
    for other in ("cpu", "cuda", "cuda:1", "xpu:2"):
        placement.require_apart(torch.device(other), own)
    placement.require_apart(torch.device("cpu"), torch.device("cpu"))
    placement.require_apart(torch.device("cpu:0"), torch.device("cpu:0"))
