"""What scripts/compatibility.py runs in the environment of one vLLM version.

    python -m scripts.compatibility_probe FOLDER FILE

FOLDER holds the models; FILE gets the versions and the outcome of each check as
JSON. Each setting of SCX_ENC_LAYERS has a process of its own, with all its
engines one after the other. Native engines run first and share a compile cache
with the encoded ones, which must not load a plain graph from it.
"""

import json
import platform
import sys
from importlib.metadata import version
from pathlib import Path
from typing import Any

from lab.engines import engine, greedy, in_new_process, shut_down
from lab.tiny_models import PROMPTS

LAYERS = 2
MODELS = {"llama": "LlamaForCausalLM", "qwen2": "Qwen2ForCausalLM"}
MODES = {"eager": True, "compiled": False}
CASES = [(model, mode) for mode in MODES for model in MODELS]
CHECKS = [f"{model}, {mode}" for model, mode in CASES] + ["refusal"]
REFUSED = "99"
REFUSAL = f"SCX_ENC_LAYERS='99': this model has the layers 0 to {LAYERS - 1}"


def versions() -> dict[str, str]:
    found = {"python": platform.python_version()}
    for name in ("scx-vllm", "vllm", "torch", "transformers"):
        found[name] = version(name)
    return found


def run(model: Path, eager: bool) -> dict[str, Any]:
    """The greedy tokens of one engine, and how many of its layers ran encoded."""
    llm = engine(model, enforce_eager=eager, skip_tokenizer_init=True)
    tokens = greedy(llm, PROMPTS)
    encoded = llm.apply_model(
        lambda model: sum(layer.calls > 0 for layer in getattr(model, "encoded", ()))
    )
    shut_down(llm)
    return {"tokens": tokens, "encoded": sum(encoded)}


def run_each(folder: Path, cases: list[tuple[str, str]]) -> list[dict[str, Any]]:
    outcomes = []
    for model, mode in cases:
        try:
            outcomes.append(run(folder / model, MODES[mode]))
        except Exception as error:  # whatever a version raises is its outcome
            lines = str(error).strip().splitlines() or [""]
            outcomes.append({"error": f"{type(error).__name__}: {lines[-1].strip()}"})
    return outcomes


def verdict(native: dict[str, Any], encoded: dict[str, Any]) -> str:
    """`pass`, or the line that says what went wrong."""
    if "error" in native:
        return f"vLLM itself: {native['error']}"
    if "error" in encoded:
        return encoded["error"]
    if (native["encoded"], encoded["encoded"]) != (0, LAYERS):
        return (
            f"{native['encoded']} layers ran encoded in the native engine and "
            f"{encoded['encoded']} of {LAYERS} in the encoded one"
        )
    differing = sum(
        ours != theirs
        for ours, theirs in zip(encoded["tokens"], native["tokens"], strict=True)
    )
    if differing:
        return f"tokens differ in {differing} of {len(native['tokens'])} prompts"
    return "pass"


def main() -> None:
    folder, file = map(Path, sys.argv[1:])

    def outcomes(setting: str, cases: list[tuple[str, str]]) -> list[dict[str, Any]]:
        env = {"SCX_ENC_LAYERS": setting, "VLLM_CACHE_ROOT": str(file.parent / "cache")}
        return in_new_process(run_each, folder, cases, env=env)

    native, encoded = outcomes("", CASES), outcomes("all", CASES)
    checks = {
        f"{model}, {mode}": verdict(theirs, ours)
        for (model, mode), theirs, ours in zip(CASES, native, encoded, strict=True)
    }
    (refused,) = outcomes(REFUSED, [("llama", "eager")])
    line = refused.get("error", "not refused")
    checks["refusal"] = "pass" if line.endswith(REFUSAL) else line
    result = {"versions": versions(), "checks": checks}
    file.write_text(json.dumps(result))


if __name__ == "__main__":
    main()
