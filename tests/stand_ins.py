"""What stands in for an engine or a server where processes are tested."""

import os
import subprocess
import time
from pathlib import Path

import psutil

from lab.processes import end_with_parent

SERVER = "from tests.stand_ins import hold; hold()"


def hold(*_):
    """Start a process, leave both numbers in a file, and wait to be ended."""
    other = subprocess.Popen(["sleep", "300"])  # noqa: S607
    file = Path(os.environ["PIDS"])
    draft = file.with_suffix(".draft")
    draft.write_text(f"{os.getpid()} {other.pid}")
    draft.rename(file)
    time.sleep(300)


def serve_nothing(*_):
    os.setpgrp()
    end_with_parent()
    hold()


def gone(pids, seconds=10.0):
    """Whether all of them end in time."""
    deadline = time.monotonic() + seconds
    while (running := any(map(alive, pids))) and time.monotonic() < deadline:
        time.sleep(0.1)
    return not running


def alive(pid):
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False
