"""The versions of vLLM that ran encoded, and what is said of any other.

docs/versions.md and the records of benchmarks on GPUs show each; a test holds them to
agree. A version that lacks what this package leans on (docs/vllm-seams.md) is refused
where that is missed.
"""

from importlib.metadata import version

RUN = ("0.26", "0.27", "0.28", "0.29", "0.30", "0.31", "0.32")
"""Minor versions."""


def unknown() -> str:
    """What to warn of if the installed vLLM is a version that was never run; else ""."""
    installed = version("vllm")
    if ".".join(installed.split(".")[:2]) in RUN:
        return ""
    return (
        f"vllm {installed} was never run with this package, only {RUN[0]} to {RUN[-1]} "
        "were: compare its tokens with those of a native engine first"
    )
