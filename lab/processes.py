"""Processes that do not outlive the command that started them, however it ends."""

import contextlib
import multiprocessing
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from multiprocessing.connection import Connection
from typing import Any

from lab.cli import UsageError
from scx.errors import SCXError

PATIENCE = 30
"""Seconds that the processes of a session have to end when they are told to."""


class ArmFailed(Exception):
    """An arm can do no more and was ended; the text is one line that says why."""


@contextlib.contextmanager
def interruptible() -> Iterator[None]:
    """Here SIGINT, SIGTERM and SIGHUP raise KeyboardInterrupt.

    SIGINT does so too where it was ignored, as it is in what a script starts with `&`:
    vLLM's processes take it back as well, and a command that did not would go on
    without them. SIGHUP stays ignored where it was, which is what nohup is for.
    """
    numbers = [signal.SIGINT, signal.SIGTERM]
    if signal.getsignal(signal.SIGHUP) is not signal.SIG_IGN:
        numbers.append(signal.SIGHUP)
    before = {each: signal.signal(each, signal.default_int_handler) for each in numbers}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def in_new_process(
    function: Callable[..., Any],
    *args: Any,
    env: dict[str, str] | None = None,
    preload: Sequence[str] = (),
) -> Any:
    """The result of `function(*args)` in a process of its own.

    `env` are all its variables, if they are not those of this process. It starts as a
    fresh interpreter, or forks from one that has imported the modules `preload`.
    """
    context = multiprocessing.get_context("forkserver" if preload else "spawn")
    if preload:
        context.set_forkserver_preload(list(preload))
    # A fork server has the variables of the process that started it.
    variables = dict(os.environ) if env is None else env
    with ProcessPoolExecutor(
        1, context, initializer=_set_variables, initargs=(variables,)
    ) as pool:
        return pool.submit(function, *args).result()


def _set_variables(variables: dict[str, str]) -> None:
    os.environ.clear()
    os.environ.update(variables)


def in_own_session(function: Callable[..., Any], *arguments: Any) -> Any:
    """The result of a call in a fresh interpreter, of which nothing is left then.

    An engine is run there and not here, because vLLM may swallow the exception of an
    interrupt. Raises UsageError as the function does, and ArmFailed for any other error.
    """
    context = multiprocessing.get_context("spawn")
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=_call, args=(sender, function, arguments))
    process.start()
    sender.close()
    try:
        result = receiver.recv()
    except EOFError:
        process.join()
        result = ArmFailed(f"its process ended with status {process.exitcode}")
    finally:
        _end(process)
    if isinstance(result, Exception):
        raise result
    return result


def _call(
    report: Connection, function: Callable[..., Any], arguments: tuple[Any, ...]
) -> None:
    os.setsid()
    end_with_parent()
    try:
        report.send(function(*arguments))
    except (UsageError, SCXError) as error:
        report.send(UsageError(str(error)))
    # Whatever it is: this process shows where, and the one that asked says what.
    except Exception as error:
        line = (str(error).strip().splitlines() or [""])[-1]
        report.send(ArmFailed(f"{type(error).__name__}: {line}"))
        raise


def end_with_parent() -> None:
    """Kill this process and its group as soon as the one that spawned it is gone.

    For the leader of a group, which does not hear of its parent's end.
    """
    parent: Any = multiprocessing.parent_process()

    def wait() -> None:
        parent.join()
        os.killpg(0, signal.SIGKILL)

    threading.Thread(target=wait, daemon=True).start()


def _end(process: Any) -> None:
    """End a process and all of the session that it leads; interrupted, at once."""
    deadline = time.monotonic() + PATIENCE
    try:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGTERM)
            while time.monotonic() < deadline:
                process.join(0.1)
                os.killpg(process.pid, 0)
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        # It may have been too young to lead one.
        process.kill()
        process.join()
