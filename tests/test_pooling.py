"""Classifiers and embedders that vLLM makes of generating models, under either name."""

import pytest
import torch

from tests import tiny_models
from tests.engines import engine, in_new_process, shut_down
from tests.tiny_models import PROMPTS

KINDS = ("Llama", "Qwen2", "Qwen3")
YES, NO = "yes", "no"


def pool_each(runs):
    """Of each run, engine arguments: what it pools of each prompt, and its layers that
    are encoded."""
    found = []
    for run in runs:
        llm = engine(runner="pooling", skip_tokenizer_init=True, **run)
        task = llm.embed if run.get("convert") == "embed" else llm.classify
        outputs = task([{"prompt_token_ids": p} for p in PROMPTS], use_tqdm=False)
        pooled = [
            getattr(output.outputs, "embedding", None) or output.outputs.probs
            for output in outputs
        ]
        layers = llm.apply_model(lambda model: len(getattr(model, "encoded", [])))
        found.append((pooled, layers[0]))
        shut_down(llm)
    return found


def causal(kind):
    return {
        "convert": "classify",
        "hf_overrides": {"architectures": [f"{kind}ForCausalLM"]},
    }


def save_words(folder):
    """A tokenizer that has the two words by which Qwen3-Reranker answers."""
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    words = Tokenizer(models.WordLevel({NO: 0, YES: 1}, NO))
    PreTrainedTokenizerFast(tokenizer_object=words).save_pretrained(folder)


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    root = tmp_path_factory.mktemp("pooling")
    made = {}
    for kind in KINDS:
        name = f"{kind}ForSequenceClassification"
        model = tiny_models.save(root / name, name, num_labels=2, pad_token_id=0)
        made[name] = {"model": model}
        made[f"{name} as {kind}ForCausalLM"] = {"model": model} | causal(kind)
        base = tiny_models.save(root / f"{kind}Model", f"{kind}Model")
        if kind != "Qwen3":  # vLLM has no name of its own for that one.
            made[f"{kind}Model"] = {"model": base, "convert": "embed"}
    # As vLLM's documentation loads the original weights.
    reranker = tiny_models.save(root / "reranker", "Qwen3ForCausalLM")
    save_words(reranker)
    made["Qwen3-Reranker"] = {
        "model": reranker,
        "tokenizer": str(reranker),
        "hf_overrides": {
            "architectures": ["Qwen3ForSequenceClassification"],
            "classifier_from_token": [NO, YES],
            "is_original_qwen3_reranker": True,
        },
    }
    return {
        name: run
        | {part: str(run[part]) for part in ("model", "tokenizer") if part in run}
        for name, run in made.items()
    }


@pytest.fixture(scope="module")
def pooled(runs):
    """By name of the run: what it pools natively, and encoded with how many layers."""
    native, encoded = (
        in_new_process(pool_each, list(runs.values()), env={"SCX_ENC_LAYERS": layers})
        for layers in ("", "all")
    )
    return {
        name: (theirs, ours)
        for name, (theirs, _), ours in zip(runs, native, encoded, strict=True)
    }


def test_every_layer_is_encoded_and_the_results_are_native(pooled):
    for name, (native, (encoded, layers)) in pooled.items():
        assert layers == tiny_models.SHAPE["num_hidden_layers"], name
        result, expected = torch.tensor(encoded), torch.tensor(native)
        assert expected.std() > 1e-3, name
        # Sums in float32 in another order.
        assert torch.allclose(result, expected, atol=1e-5, rtol=1e-4), name


def test_both_names_are_one_model(pooled):
    for kind in KINDS:
        name = f"{kind}ForSequenceClassification"
        assert pooled[name] == pooled[f"{name} as {kind}ForCausalLM"]
