"""What a record says of the machine that it was made on."""

from pathlib import Path

from lab import provenance


def test_the_host(tmp_path):
    cache = tmp_path / "sys/devices/system/cpu/cpu0/cache/index2"
    cache.mkdir(parents=True)
    for name, text in (("level", "3"), ("type", "Unified"), ("size", "307200K")):
        (cache / name).write_text(f"{text}\n")
    for node in ("node0", "node1", "possible"):
        (tmp_path / "sys/devices/system/node" / node).mkdir(parents=True)
    (tmp_path / "proc").mkdir()
    (tmp_path / "proc/cpuinfo").write_text("flags\t\t: fpu amx_tile avx2 avx512fp16\n")
    assert provenance.host(tmp_path) == {
        "cpu": provenance.cpu_name(),
        "caches": {"L3 Unified": "307200K"},
        "numa_nodes": 2,
        "flags": ["avx2", "amx_tile"],
    }


def test_this_host():
    found = provenance.host(Path("/"))
    assert found["numa_nodes"] >= 1
    assert set(found["flags"]) <= set(provenance.HOST_FLAGS)
