"""How far encoded bfloat16 logits are from exact ones, beside native bfloat16.

    python -m scripts.parity        writes docs/parity.json and docs/parity.md

Each arm runs the embedded models on prefixes of the test prompts and keeps the
20 largest logits of the next token. The reference is native float32, so the row
of native bfloat16 says what the type itself costs.
"""

import json
import platform
import statistics
from importlib.metadata import version
from pathlib import Path
from typing import Any

from lab.cli import Parser
from lab.engines import engine, in_new_process
from lab.prompts import MIXED
from lab.tables import as_markdown
from scx.commands.demo_model import embedded_model

TOP = 20
PREFIXES = 4
REFERENCE = {"dtype": "float32"}
ARMS = {
    "native": ("", {}),
    "native, 4 requests per batch": ("", {"max_num_seqs": 4}),
    "0": ("0", {}),
    "0,29": ("0,29", {}),
    "all": ("all", {}),
}
DOCS = Path(__file__).parent.parent / "docs"


def top_logits(model: Path, engine_args: dict[str, Any]) -> list[dict[int, float]]:
    """The largest logits of the token after each prefix, by token id."""
    from vllm import SamplingParams

    chosen = {"dtype": "bfloat16"} | engine_args
    llm = engine(model, logprobs_mode="raw_logits", max_logprobs=TOP, **chosen)
    params = SamplingParams(temperature=0, max_tokens=1, logprobs=TOP)
    inputs = [{"prompt_token_ids": p} for p in prefixes(llm.get_tokenizer())]
    return [
        {token: entry.logprob for token, entry in output.outputs[0].logprobs[0].items()}
        for output in llm.generate(inputs, params, use_tqdm=False)
    ]


def prefixes(tokenizer: Any) -> list[list[int]]:
    tokens = [tokenizer.encode(prompt) for prompt in MIXED]
    ends = [
        sorted({max(1, len(t) * i // PREFIXES) for i in range(1, PREFIXES + 1)})
        for t in tokens
    ]
    return [t[:end] for t, stops in zip(tokens, ends, strict=True) for end in stops]


def compare(
    ours: list[dict[int, float]], exact: list[dict[int, float]]
) -> dict[str, Any]:
    """Agreement of the top token, and differences over the logits in both lists."""
    same, differences = 0, []
    for one, other in zip(ours, exact, strict=True):
        same += max(one, key=one.__getitem__) == max(other, key=other.__getitem__)
        common = one.keys() & other.keys()
        differences += [abs(one[token] - other[token]) for token in common]
    return {
        "prefixes": len(exact),
        "top1_agreement": same / len(exact),
        "mean_difference": statistics.fmean(differences),
        "largest_difference": max(differences),
    }


def main() -> None:
    Parser(description=__doc__).parse_args()
    results: dict[str, Any] = {
        "dtype": "bfloat16",
        "device": f"a CPU ({platform.machine()})",
        "versions": {name: version(name) for name in ("scx-vllm", "vllm", "torch")},
        "models": {},
    }
    for architecture in ("llama", "qwen2"):
        model = embedded_model(architecture)
        exact = in_new_process(top_logits, model, REFERENCE)
        arms = results["models"][architecture] = {}
        for arm, (layers, engine_args) in ARMS.items():
            env = {"SCX_ENC_LAYERS": layers}
            ours = in_new_process(top_logits, model, engine_args, env=env)
            arms[arm] = compare(ours, exact)
            print(architecture, arm, arms[arm], flush=True)
    DOCS.mkdir(exist_ok=True)
    (DOCS / "parity.json").write_text(json.dumps(results, indent=2) + "\n")
    (DOCS / "parity.md").write_text(markdown(results))


def markdown(results: dict[str, Any]) -> str:
    versions = ", ".join(
        f"{name} {number}" for name, number in results["versions"].items()
    )
    rows = [
        {
            "model": model,
            "arm": arm,
            "prefixes": str(row["prefixes"]),
            "same top token": f"{row['top1_agreement']:.1%}",
            "mean difference": f"{row['mean_difference']:.3f}",
            "largest": f"{row['largest_difference']:.3f}",
        }
        for model, arms in results["models"].items()
        for arm, row in arms.items()
    ]
    lines = [
        "# Encoded and native logits in bfloat16, against float32",
        "",
        f"SmolLM2-135M in {results['dtype']} on {results['device']}, {versions}.",
        "The reference is native float32; differences are over the largest logits of the",
        f"next token, up to {TOP} of them.",
        "Written by `python -m scripts.parity`.",
        "",
        as_markdown(rows),
        "",
    ]
    return "\n".join(lines)


if __name__ == "__main__":
    main()
