"""Write prompts of an exact length in tokens, and prompts.json, which describes them.

    python data/make_prompts.py [--tokenizer PATH] [--lengths 1024,4096,8192,32768]
        [--seed 0] [--out data]

The text is generated from the seed: see data/prompts.py.
"""

import argparse
import json
import os
import re
import sys
from importlib.metadata import version
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
if __name__ == "__main__":
    # A script looks for modules in its own folder; these are named from the root.
    sys.path[0] = str(ROOT)

from data.prompts import make_prompt  # noqa: E402
from lab.cli import Parser  # noqa: E402
from scx.errors import SCXError  # noqa: E402

LENGTHS = "1024,4096,8192,32768"


def file_name(length: int) -> str:
    """prompt_4k.txt for 4096 tokens, prompt_1000.txt for 1000."""
    size = f"{length // 1024}k" if length % 1024 == 0 else str(length)
    return f"prompt_{size}.txt"


def load_tokenizer(path: str | None) -> Any:
    """The tokenizer of a model, or of the embedded one. Raises SCXError."""
    from transformers import AutoTokenizer

    if path is None:
        from scx.commands.demo_model import embedded_model

        path = str(embedded_model("llama"))
    try:
        return AutoTokenizer.from_pretrained(path)
    except (OSError, ValueError) as error:
        reason = str(error).splitlines()[0]
        raise SCXError(f"--tokenizer {path!r}: there is none ({reason})") from error


def write_prompts(tokenizer: Any, lengths: list[int], seed: int, out: Path) -> None:
    """Write a file for each length and describe all of them. Raises SCXError."""
    description = out / "prompts.json"
    try:
        known = json.loads(description.read_text()) if description.exists() else {}
    except ValueError as error:
        raise SCXError(f"{description} is not JSON: {error}") from error
    out.mkdir(parents=True, exist_ok=True)
    for length in lengths:
        path = out / file_name(length)
        replace(path, make_prompt(tokenizer, length, seed))
        known[path.name] = {
            "tokenizer": Path(tokenizer.name_or_path).name,
            "length": length,
            "seed": seed,
            "versions": {name: version(name) for name in ("transformers", "tokenizers")},
        }
        print(f"{path}: {length} tokens", flush=True)
    replace(description, json.dumps(known, indent=2, sort_keys=True) + "\n")


def replace(path: Path, text: str) -> None:
    """Write a file that is there as a whole or not at all."""
    draft = path.with_name(f".{path.name}.{os.getpid()}")
    draft.write_bytes(text.encode())
    draft.replace(path)


def token_counts(text: str) -> list[int]:
    if not re.fullmatch(r"[1-9]\d{0,8}(,[1-9]\d{0,8})*", text):
        raise argparse.ArgumentTypeError(f"{text!r} is not like {LENGTHS}")
    return [int(length) for length in text.split(",")]


def main(arguments: list[str] | None = None) -> int:
    parser = Parser(description=__doc__)
    parser.add_argument("--tokenizer", help="a model's folder (default: the embedded)")
    parser.add_argument("--lengths", type=token_counts, default=LENGTHS, help="in tokens")
    parser.add_argument("--seed", type=int, default=0, help="of the text (default: 0)")
    parser.add_argument("--out", type=Path, default=ROOT / "data", help="a folder")
    options = parser.parse_args(arguments)
    try:
        tokenizer = load_tokenizer(options.tokenizer)
        write_prompts(tokenizer, options.lengths, options.seed, options.out)
    except (SCXError, OSError) as error:
        parser.error(str(error))
    return 0


if __name__ == "__main__":
    sys.exit(main())
