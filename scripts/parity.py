"""How far encoded bfloat16 logits are from native ones, beside native reordered.

    python -m scripts.parity        writes docs/parity.json and docs/parity.md

Each arm runs the embedded models on prefixes of the test prompts and keeps the
20 largest logits of the next token. The reference is native; `native,
reversed` is native on the same prompts in another batch order, which is what
vLLM's own rounding amounts to.
"""

import json
import platform
from importlib.metadata import version
from pathlib import Path
from typing import Any

from scx.embedded import embedded_model
from tests.engines import engine, in_new_process
from tests.prompts import MIXED

TOP = 20
PREFIXES = 10
ARMS = {"native, reversed": "", "0": "0", "0,29": "0,29", "all": "all"}
DOCS = Path(__file__).parent.parent / "docs"


def top_logits(model: Path, is_reversed: bool) -> list[dict[int, float]]:
    """The largest logits of the token after each prefix, by token id."""
    from vllm import SamplingParams

    llm = engine(model, dtype="bfloat16", logprobs_mode="raw_logits", max_logprobs=TOP)
    prompts = prefixes(llm.get_tokenizer())
    if is_reversed:
        prompts.reverse()
    params = SamplingParams(temperature=0, max_tokens=1, logprobs=TOP)
    inputs = [{"prompt_token_ids": prompt} for prompt in prompts]
    result = [
        {token: entry.logprob for token, entry in output.outputs[0].logprobs[0].items()}
        for output in llm.generate(inputs, params, use_tqdm=False)
    ]
    return result[::-1] if is_reversed else result


def prefixes(tokenizer: Any) -> list[list[int]]:
    tokens = [tokenizer.encode(prompt) for prompt in MIXED]
    ends = [
        sorted({max(1, len(t) * i // PREFIXES) for i in range(1, PREFIXES + 1)})
        for t in tokens
    ]
    return [t[:end] for t, stops in zip(tokens, ends, strict=True) for end in stops]


def compare(
    ours: list[dict[int, float]], native: list[dict[int, float]]
) -> dict[str, Any]:
    same, largest = 0, 0.0
    for one, other in zip(ours, native, strict=True):
        same += max(one, key=one.__getitem__) == max(other, key=other.__getitem__)
        common = one.keys() & other.keys()
        largest = max([largest, *(abs(one[token] - other[token]) for token in common)])
    return {
        "prefixes": len(native),
        "top1_agreement": same / len(native),
        "max_diff": largest,
    }


def main() -> None:
    results: dict[str, Any] = {
        "dtype": "bfloat16",
        "device": f"a CPU ({platform.machine()})",
        "versions": {name: version(name) for name in ("scx-vllm", "vllm", "torch")},
        "models": {},
    }
    for architecture in ("llama", "qwen2"):
        model = embedded_model(architecture)
        native = in_new_process(top_logits, model, False)
        arms = results["models"][architecture] = {}
        for arm, layers in ARMS.items():
            env = {"SCX_ENC_LAYERS": layers}
            ours = in_new_process(top_logits, model, arm == "native, reversed", env=env)
            arms[arm] = compare(ours, native)
            print(architecture, arm, arms[arm], flush=True)
    DOCS.mkdir(exist_ok=True)
    (DOCS / "parity.json").write_text(json.dumps(results, indent=2) + "\n")
    (DOCS / "parity.md").write_text(markdown(results))


def markdown(results: dict[str, Any]) -> str:
    versions = ", ".join(
        f"{name} {number}" for name, number in results["versions"].items()
    )
    lines = [
        "# Encoded against native logits",
        "",
        f"SmolLM2-135M, {results['dtype']}, on {results['device']}, {versions}.",
        "Written by `python -m scripts.parity`. The difference is the largest among the",
        f"{TOP} largest logits of the next token.",
        "",
        "| model | arm | prefixes | same top token | largest logit difference |",
        "|---|---|---|---|---|",
    ]
    for model, arms in results["models"].items():
        for arm, row in arms.items():
            lines.append(
                f"| {model} | {arm} | {row['prefixes']} | {row['top1_agreement']:.1%} "
                f"| {row['max_diff']:.3f} |"
            )
    return "\n".join([*lines, ""])


if __name__ == "__main__":
    main()
