"""One arm of an evaluation, in a process and a session of its own.

vLLM reads plugins once per process, so each arm gets a fresh one. It also leads a
session, so that all that it starts can be ended with it.
"""

import os
import shutil
from dataclasses import asdict, dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from benchmark_acc.logs import Arm, Setting, read_lm_eval, write_arm
from lab.cli import UsageError
from lab.processes import in_own_session
from scx.keys import scx_env_init

TASKS = Path(__file__).resolve().parent / "tasks"


@dataclass(frozen=True)
class Plan:
    """What every arm is to do."""

    model: str
    """A model's folder or hub name."""
    tasks: list[str]
    """Names that lm-eval knows."""
    setting: Setting
    secure_device: str
    codec: str
    provenance: dict[str, Any]
    """The fields `cores`, `commit` and `dirty` of Arm."""


def run_arm(plan: Plan, layers: str, folder: Path) -> None:
    """Evaluate with these layers encoded. The folder is there when all is in it.

    An earlier one is replaced. Raises UsageError or ArmFailed.
    """
    draft = folder.with_name(f".{folder.name}.{os.getpid()}")
    draft.mkdir(parents=True)
    try:
        in_own_session(evaluate, plan, layers, draft)
        arm = Arm(
            **asdict(plan.setting),
            **plan.provenance,
            arm=folder.name,
            layers=layers,
            secure_device=plan.secure_device,
            codec=plan.codec,
            utc=datetime.now(timezone.utc).isoformat(timespec="seconds"),
            tasks=read_lm_eval(draft),
        )
        write_arm(arm, draft)
        shutil.rmtree(folder, ignore_errors=True)
        draft.rename(folder)
    finally:
        shutil.rmtree(draft, ignore_errors=True)


def evaluate(plan: Plan, layers: str, folder: Path) -> None:
    """Run lm-eval in this process, with its files in `folder`.

    Raises UsageError before the engine starts.
    """
    os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "2")
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    scx_env_init(layers, plan.secure_device, codec=plan.codec)
    manager = load_tasks(plan.tasks)
    from lm_eval import simple_evaluate
    from lm_eval.loggers import EvaluationTracker
    from lm_eval.utils import simple_parse_args_string

    setting = plan.setting
    model_args = {
        "pretrained": plan.model,
        "dtype": setting.dtype,
        "tensor_parallel_size": setting.tensor_parallel_size,
        "seed": setting.seed,
    }
    # A name that ends like this puts all files into the folder itself.
    tracker = EvaluationTracker(output_path=str(folder / "results.json"))
    results: Any = simple_evaluate(
        model="vllm",
        model_args=model_args | simple_parse_args_string(setting.model_args),
        tasks=list(plan.tasks),
        task_manager=manager,
        batch_size="auto",
        limit=setting.limit,
        evaluation_tracker=tracker,
        random_seed=setting.seed,
        numpy_random_seed=setting.seed,
        torch_random_seed=setting.seed,
        fewshot_random_seed=setting.seed,
    )
    samples = results.pop("samples")
    tracker.save_results_aggregated(results=results, samples=samples)
    for name in results["configs"]:
        tracker.save_results_samples(task_name=name, samples=samples[name])


def load_tasks(names: list[str]) -> Any:
    """lm-eval's TaskManager, once the data of the tasks are here. Raises UsageError."""
    from lm_eval.tasks import TaskManager

    manager = TaskManager(include_path=str(TASKS), include_defaults=False)
    if not set(names) <= set(manager.all_tasks):
        # Reading lm-eval's own, some thousands, takes seconds.
        manager = TaskManager(include_path=str(TASKS))
    for name in names:
        if name not in manager.all_tasks:
            raise UsageError(
                f"TASK {name!r}: lm-eval has none of that name (lm_eval ls tasks lists "
                "them; pydoc needs no hub)"
            )
        try:
            manager.load([name])
        except (ImportError, OSError, ValueError) as error:
            reason = (str(error).strip() or type(error).__name__).splitlines()[0]
            raise UsageError(
                f"TASK {name!r}: its data cannot be had ({reason}); pydoc needs no hub"
            ) from error
    return manager
