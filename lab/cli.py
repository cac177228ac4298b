"""The command line of every script and benchmark here."""

import argparse
from typing import Any, NoReturn


class UsageError(Exception):
    """What was asked for cannot be done; the text is one line that says why."""


class Parser(argparse.ArgumentParser):
    """A parser that keeps the description's lines, and whose errors are one line."""

    def __init__(self, **arguments: Any) -> None:
        """`arguments` are those of argparse."""
        super().__init__(
            formatter_class=argparse.RawDescriptionHelpFormatter, **arguments
        )

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: {message}\n")


def positive(text: str) -> int:
    """A whole number from 1."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number from 1")
    return int(text)


def natural(text: str) -> int:
    """A whole number from 0."""
    if not text.isdecimal():
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number from 0")
    return int(text)
