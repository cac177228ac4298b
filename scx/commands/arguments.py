"""The types of the arguments of commands: each raises ArgumentTypeError for a bad one."""

import argparse
import math
from pathlib import Path

from scx.errors import SCXConfigError


def gigabytes(text: str) -> float:
    """An argument in GB, in bytes. Raises ArgumentTypeError."""
    if not 0 < (value := _number(text)) < math.inf:
        raise argparse.ArgumentTypeError(f"{text!r}: a number above 0 is allowed")
    return value * 1e9


def cores(text: str) -> int:
    """A number of cores. Raises ArgumentTypeError."""
    if not text.isdecimal() or (value := int(text)) < 1:
        raise argparse.ArgumentTypeError(f"{text!r}: a whole number from 1 is allowed")
    return value


def microseconds(text: str) -> float:
    """An argument in microseconds, in seconds. Raises ArgumentTypeError."""
    if not 0 <= (value := _number(text)) < math.inf:
        raise argparse.ArgumentTypeError(f"{text!r}: 0 or a larger number is allowed")
    return value * 1e-6


def model(text: str) -> str:
    """A folder, or the name of a model on a hub, which is not looked up."""
    if text.startswith(("/", ".", "~")) and not Path(text).is_dir():
        raise argparse.ArgumentTypeError(f"there is no folder {text}")
    return text


def file(text: str) -> Path:
    """A file that exists."""
    if not (path := Path(text)).is_file():
        raise argparse.ArgumentTypeError(f"there is no file {text}")
    return path


def layers(text: str) -> str:
    """At least one layer, as SCX_ENC_LAYERS spells them."""
    _require(SCX_ENC_LAYERS=text)
    if not text.strip():
        raise argparse.ArgumentTypeError("name one layer at least, or all")
    return text


def codec(text: str) -> str:
    """A name that SCX_CODEC may have."""
    _require(SCX_CODEC=text)
    return text


def _number(text: str) -> float:
    """NaN for what is no number."""
    try:
        return float(text)
    except ValueError:
        return math.nan


def _require(**variables: str) -> None:
    # Here, so that `scx --help` needs nothing that is not installed.
    from scx import keys

    try:
        keys.parse_config(variables)
    except SCXConfigError as error:
        raise argparse.ArgumentTypeError(str(error)) from error
