"""Where a result comes from: versions, machine and commit."""

import platform
import re
import shutil
import subprocess
from importlib.metadata import version
from pathlib import Path
from typing import Any

HOST_FLAGS = ("avx2", "avx512f", "avx512_bf16", "amx_tile", "movdir64b", "waitpkg")


def survey() -> dict[str, Any]:
    """Versions, accelerator, cores and commit, under the names that records give them.

    For a process of its own, as CUDA is started.
    """
    import torch

    from scx import __version__
    from scx.kernels.host.cores import usable_cores

    commit, dirty = git_state()
    cuda = torch.cuda.is_available()
    others = {name: version(name) for name in ("vllm", "torch", "transformers")}
    return {
        "versions": {
            "scx-vllm": __version__,
            **others,
            "python": platform.python_version(),
        },
        "accelerator": torch.cuda.get_device_name() if cuda else cpu_name(),
        "cores": usable_cores(),
        "host": host(Path("/")),
        "commit": commit,
        "dirty": dirty,
    }


def host(root: Path) -> dict[str, Any]:
    """What decides how fast the host moves rows, from the kernel's files under `root`:
    the CPU, its caches, its NUMA nodes, and those of its instructions that matter."""
    system = root / "sys/devices/system"
    caches = {
        f"L{_line(cache / 'level')} {_line(cache / 'type')}": _line(cache / "size")
        for cache in sorted((system / "cpu/cpu0/cache").glob("index*"))
    }
    flags = re.search(
        r"^flags\s*:(.*)", (root / "proc/cpuinfo").read_text(), re.MULTILINE
    )
    has = set(flags[1].split()) if flags else set()
    return {
        "cpu": cpu_name(),
        "caches": caches,
        "numa_nodes": len(list((system / "node").glob("node[0-9]*"))),
        "flags": [flag for flag in HOST_FLAGS if flag in has],
    }


def _line(file: Path) -> str:
    return file.read_text().strip()


def cpu_name() -> str:
    """The CPU's model, or its architecture where the system does not say more."""
    match = re.search(r"model name\s*:\s*(.+)", Path("/proc/cpuinfo").read_text())
    return match[1] if match else platform.machine()


def git_state() -> tuple[str | None, bool | None]:
    """The commit of this package and whether a tracked file differs from it.

    Untracked files do not count: the results of an earlier command are such.
    """
    git = shutil.which("git")
    if git is None:
        return None, None
    describe = ["describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
    folder = str(Path(__file__).parent)
    run = subprocess.run(  # noqa: S603
        [git, "-C", folder, *describe], capture_output=True, text=True
    )
    if run.returncode != 0:
        return None, None
    commit, _, dirty = run.stdout.strip().partition("-")
    return commit, bool(dirty)
