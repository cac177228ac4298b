"""Evaluate a model with lm-eval, plain and encoded.

    run_eval_1.5b.sh TASK OUTDIR          and likewise _7b and _70b

TASK is a name that lm-eval knows, or several with commas between; `pydoc` needs no
hub. Each finished arm is in OUTDIR/TASK/MODEL/ARM and replaces an earlier one: lm-eval's
files and arm.jsonl, from which `report.py OUTDIR/TASK/MODEL` compares them.

These variables are read:

    MODEL_PATH      a model's folder or hub name
    ARMS            plain, scx or both (default)
    SCX_ENC_LAYERS  the layers of the scx arm (default: the first and the last)
    SCX_SECURE_DEVICE, SCX_CODEC and SCX_KEY_FILE, as always
    LIMIT           the number of samples of each task (default: all)
    TP              the tensor parallel size (default: 1)
    DTYPE           of the engine (default: bfloat16)
    MODEL_ARGS      more for lm-eval's vllm model: enforce_eager=True,max_model_len=4096
    SEED            of lm-eval and the engine (default: 0)
"""

import os
import re
import sys
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

if __name__ == "__main__":
    # A script looks for modules in its own folder; these are named from the root.
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

from benchmark_acc.evaluation import Plan, run_arm
from benchmark_acc.logs import LogError, Setting
from lab.cli import UsageError
from lab.processes import ArmFailed, in_new_process, interruptible
from lab.provenance import survey
from scx.errors import SCXError
from scx.keys import DEFAULT_CODEC, ENC_LAYERS, get_scx_config

ARMS = {"plain": ["plain"], "scx": ["scx"], "both": ["plain", "scx"]}


def variable(name: str, default: str, pattern: str, allowed: str) -> str:
    """Its value; an empty one counts as none. Raises UsageError."""
    text = os.environ.get(name) or default
    if not re.fullmatch(pattern, text):
        raise UsageError(f"{name}={text!r}: allowed is {allowed}")
    return text


def number(name: str, default: str, least: int) -> int:
    pattern = "[0-9]+" if least == 0 else "[1-9][0-9]*"
    return int(variable(name, default, pattern, f"a whole number from {least}"))


def make_plan(model: str, task: str, **chosen: Any) -> Plan:
    """What every arm is to do on this machine; `chosen` are fields of Setting.

    Raises UsageError or SCXError.
    """
    try:
        lm_eval = version("lm_eval")
    except PackageNotFoundError:
        raise UsageError("lm-eval is not installed: pip install -e '.[eval]'") from None
    machine = in_new_process(survey)
    setting = Setting(
        model=Path(model).resolve().name,
        versions=machine["versions"] | {"lm-eval": lm_eval},
        accelerator=machine["accelerator"],
        **chosen,
    )
    provenance = {name: machine[name] for name in ("cores", "commit", "dirty")}
    config = get_scx_config()
    tasks = task.split(",")
    return Plan(model, tasks, setting, config.secure_device, config.codec, provenance)


def encoded_layers(model: str) -> str:
    """Those of SCX_ENC_LAYERS, or the first and the last of the model.

    Raises UsageError or SCXError.
    """
    from huggingface_hub.errors import StrictDataclassError
    from transformers import AutoConfig

    try:
        config = AutoConfig.from_pretrained(model)
    except (OSError, ValueError, StrictDataclassError) as error:
        reason = str(error).strip().splitlines()[0]
        raise UsageError(
            f"MODEL_PATH={model!r}: no model's folder, and none from the hub ({reason}); "
            "scx demo-model prints the folder of one that needs no hub"
        ) from error
    layers = config.get_text_config().num_hidden_layers
    if not os.environ.get(ENC_LAYERS):
        os.environ[ENC_LAYERS] = f"0,{layers - 1}"
    chosen = get_scx_config()
    if chosen.enc_layers == "all":
        return "all"
    return ",".join(map(str, chosen.layers_of(layers)))


def arm_name(layers: str, plan: Plan) -> str:
    """That of the arm's folder."""
    if not layers:
        return "plain"
    device = "" if plan.secure_device == "cpu" else f"@{plan.secure_device}"
    codec = "" if plan.codec == DEFAULT_CODEC else f"+{plan.codec}"
    return f"scx-{layers}{device}{codec}"


def run_eval(task: str, out: Path) -> None:
    """Run the arms that the variables ask for.

    Raises UsageError or SCXError before an engine starts, or ArmFailed.
    """
    if "/" in task:
        raise UsageError(f"TASK {task!r}: a name without / is needed")
    arms = ARMS[variable("ARMS", "both", "|".join(ARMS), ", ".join(ARMS))]
    model = variable("MODEL_PATH", "", ".+", "a model's folder or hub name")
    chosen = {
        "dtype": variable("DTYPE", "bfloat16", "[a-z0-9]+", "a type, such as float32"),
        "tensor_parallel_size": number("TP", "1", least=1),
        "model_args": os.environ.get("MODEL_ARGS", ""),
        "limit": number("LIMIT", "", least=1) if os.environ.get("LIMIT") else None,
        "seed": number("SEED", "0", least=0),
    }
    encoded = encoded_layers(model)
    plan = make_plan(model, task, **chosen)
    for arm in arms:
        layers = encoded if arm == "scx" else ""
        name = arm_name(layers, plan)
        folder = out / task / plan.setting.model / name
        say(f"arm {name}")
        run_arm(plan, layers, folder)
        say(f"arm {name} is in {folder}")


def say(text: str) -> None:
    print(f"run_eval: {text}", file=sys.stderr, flush=True)


def exit_status(run: Callable[[], None]) -> int:
    """That of a command; whatever ends it is one line."""
    os.environ.setdefault("HF_HUB_VERBOSITY", "error")
    try:
        with interruptible():
            run()
    except (UsageError, SCXError, OSError) as error:
        say(str(error))
        return 2
    except (ArmFailed, LogError) as error:
        say(f"the arm failed: {error}")
        return 1
    except KeyboardInterrupt:
        say("interrupted; finished arms are kept")
        return 130
    return 0


def main(arguments: list[str]) -> int:
    if len(arguments) != 2:
        say("two arguments are needed, TASK OUTDIR, and MODEL_PATH as a variable")
        return 2
    task, out = arguments
    return exit_status(lambda: run_eval(task, Path(out)))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
