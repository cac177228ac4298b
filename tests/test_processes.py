"""No process outlives a command, in whatever way it is told to end.

Every command is started as a script starts it with `&`, so with SIGINT ignored. What
it would start, engines and servers, are stand-ins here; tests of compare and of the
evaluation have real ones.
"""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from lab.processes import in_own_session, interruptible
from tests.stand_ins import gone

ROOT = Path(__file__).parent.parent
# Before the commands' modules take it.
PREPARED = """
import pathlib, sys
from lab import processes
processes.in_new_process = lambda *_: {
    "versions": {}, "accelerator": "", "cores": 1, "commit": None, "dirty": None
}
from benchmark_throughput import compare, harness, serve, single
from tests import stand_ins
"""
COMMANDS = {
    "compare": """
harness.serve = stand_ins.serve_nothing
sys.exit(compare.main())
""",
    "single": """
single.run = stand_ins.hold
sys.exit(single.main("", "qwen2"))
""",
    "serve": """
serve.vllm = lambda *_: [sys.executable, "-c", stand_ins.SERVER]
serve.RESULTS = pathlib.Path(sys.argv[-1])
sys.exit(serve.main())
""",
}


def ignore_interrupts_alone():
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    # The tests themselves may run under nohup.
    signal.signal(signal.SIGHUP, signal.SIG_DFL)


def in_background(command, **options):
    """As a shell without job control starts it with `&`."""
    return subprocess.Popen(  # noqa: S603
        command, preexec_fn=ignore_interrupts_alone, **options
    )


def wait_for(file, process):
    deadline = time.monotonic() + 60
    while not file.exists():
        assert process.poll() is None, "it ended"
        assert time.monotonic() < deadline
        time.sleep(0.05)
    return [int(each) for each in file.read_text().split()]


@pytest.mark.parametrize("command", COMMANDS)
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_command_that_is_told_to_end(command, number, tmp_path):
    (tmp_path / "config.json").write_text('{"num_hidden_layers": 2}')
    pids = tmp_path / "pids"
    code = PREPARED + COMMANDS[command]
    run = in_background(
        [sys.executable, "-c", code, "--model", str(tmp_path)],
        cwd=ROOT,
        env=os.environ | {"PIDS": str(pids)},
        stderr=subprocess.PIPE,
        text=True,
    )
    started = wait_for(pids, run)
    run.send_signal(number)
    _, said = run.communicate(timeout=60)
    assert run.returncode == 130, said
    assert said.splitlines()[-1].startswith("interrupted")
    assert gone(started)


@pytest.mark.parametrize("command", ["compare", "single"])
def test_a_command_that_is_killed(command, tmp_path):
    (tmp_path / "config.json").write_text('{"num_hidden_layers": 2}')
    pids = tmp_path / "pids"
    run = in_background(
        [sys.executable, "-c", PREPARED + COMMANDS[command], "--model", str(tmp_path)],
        cwd=ROOT,
        env=os.environ | {"PIDS": str(pids)},
    )
    started = wait_for(pids, run)
    run.kill()
    run.wait(60)
    assert gone(started)


def test_nohup_is_obeyed():
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with interruptible():
            os.kill(os.getpid(), signal.SIGHUP)
        assert signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, before)


def leave_one(file):
    other = subprocess.Popen(["sleep", "300"])  # noqa: S607
    return other.pid


def test_nothing_is_left_of_a_session_that_ended_by_itself():
    assert gone([in_own_session(leave_one, None)])


def test_a_script_of_several_runs(tmp_path):
    """run_70b.sh, told to end, ends the run that it waits for."""
    pids = tmp_path / "pids"
    python = tmp_path / "python"
    python.write_text(f"#!/bin/sh\nexec {sys.executable} -c '{STAND_IN}'\n")
    python.chmod(0o755)
    script = ROOT / "benchmark_throughput" / "run_70b.sh"
    run = in_background(
        [str(script), str(tmp_path)],
        env=os.environ
        | {"PYTHON": str(python), "PIDS": str(pids), "PYTHONPATH": str(ROOT)},
    )
    started = wait_for(pids, run)
    started += [each.pid for each in psutil.Process(run.pid).children(recursive=True)]
    run.terminate()
    assert run.wait(60) == 130
    assert gone(started)


STAND_IN = """
from lab.processes import in_own_session, interruptible
from tests.stand_ins import hold
with interruptible():
    in_own_session(hold)
"""
