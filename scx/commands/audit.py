"""What the accelerator can recover from an encoded engine, measured."""

import argparse
import importlib.util
import os

from scx.errors import SCXError


def run(options: argparse.Namespace) -> bool:
    """Attack an engine in this process, print the report and write it to a folder.

    Raises SCXError if the extra `audit` is missing, or for an engine, prompts or a
    folder that cannot be used.
    """
    # One process, so that the recorder can stand beside the model.
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
    if importlib.util.find_spec("scipy") is None:
        raise SCXError("scipy is missing: pip install -e '.[audit]'")
    from scx.audit import report, runner, views
    from scx.audit.prompts import read_prompts

    everyone = options.adversary == "all"
    try:
        result = runner.audit(
            runner.Settings(
                model=options.model,
                layers=options.layers,
                prompts=read_prompts(options.prompts),
                codec=options.codec,
                adversaries=views.ADVERSARIES if everyone else (options.adversary,),
                budget=options.budget,
                seed=options.seed,
                dtype=options.dtype,
            )
        )
        print(report.terminal(result))
        for file in report.write(result, options.out, result["codec"]):
            print(file)
    except (OSError, ValueError) as error:
        raise SCXError(str(error)) from error
    return True
