"""Classifiers and embedders that vLLM makes of generating models, under either name, and
reward models of its own."""

import json

import torch

from lab import tiny_models
from lab.engines import engine, in_new_process, shut_down
from lab.tiny_models import PROMPTS
from scx.plugin.architectures import ARCHITECTURES

YES, NO = "yes", "no"


def pool_each(runs):
    """Of each run, engine arguments: what it pools of each prompt, and its layers that
    are encoded."""
    found = []
    for run in runs:
        run = {"runner": "pooling", "skip_tokenizer_init": True} | run
        llm = engine(**run)
        prompts = [{"prompt_token_ids": p} for p in PROMPTS]
        if "RewardModel" in str(run["model"]):
            outputs = llm.encode(prompts, pooling_task="token_classify", use_tqdm=False)
            pooled = [output.outputs.data[-1].tolist() for output in outputs]
        else:
            task = llm.embed if run.get("convert") == "embed" else llm.classify
            pooled = [
                getattr(output.outputs, "embedding", None) or output.outputs.probs
                for output in task(prompts, use_tqdm=False)
            ]
        layers = llm.apply_model(lambda model: len(getattr(model, "encoded", [])))
        found.append((pooled, layers[0]))
        shut_down(llm)
    return found


def save_words(folder):
    """A tokenizer, for which vLLM asks where there are token ids too; it has the two
    words by which Qwen3-Reranker answers."""
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    words = Tokenizer(models.WordLevel({NO: 0, YES: 1}, NO))
    PreTrainedTokenizerFast(tokenizer_object=words).save_pretrained(folder)


def save_reward_model(folder, architecture, labels):
    """What transformers has no class for: the base model and two layers above it."""
    from safetensors.torch import load_file, save_file

    tiny_models.save(folder, "Qwen2Model")
    file, generator = folder / "model.safetensors", torch.Generator().manual_seed(0)
    weights = {f"model.{name}": weight for name, weight in load_file(file).items()}
    for index, rows in (("0", 128), ("2", labels)):
        weights[f"score.{index}.weight"] = torch.randn(rows, 128, generator=generator)
        weights[f"score.{index}.bias"] = torch.randn(rows, generator=generator)
    save_file(weights, file, metadata={"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    config["architectures"] = [architecture]
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def runs_of(root):
    """Engine arguments by name."""
    made = {}
    for kind in ("Llama", "Qwen2", "Qwen3"):
        name = f"{kind}ForSequenceClassification"
        model = tiny_models.save(root / name, name, num_labels=2, pad_token_id=0)
        made[name] = {"model": model}
    made["by the causal name"] = made["Qwen2ForSequenceClassification"] | {
        "convert": "classify",
        "hf_overrides": {"architectures": ["Qwen2ForCausalLM"]},
    }
    for name, labels in (("Qwen2ForRewardModel", 1), ("Qwen2ForProcessRewardModel", 2)):
        # Of each token, as the prompts have no tag at the end of a step.
        made[name] = {
            "model": save_reward_model(root / name, name, labels),
            "pooler_config": {"tok_pooling_type": "ALL"},
        }
    base = tiny_models.save(root / "base", "LlamaModel")
    made["LlamaModel"] = {"model": base, "convert": "embed"}
    # As vLLM's documentation loads the original weights.
    reranker = tiny_models.save(root / "reranker", "Qwen3ForCausalLM")
    made["Qwen3-Reranker"] = {
        "model": reranker,
        "hf_overrides": {
            "architectures": ["Qwen3ForSequenceClassification"],
            "classifier_from_token": [NO, YES],
            "is_original_qwen3_reranker": True,
        },
    }
    for model, name in ((base, "LlamaModel"), (reranker, "Qwen3-Reranker")):
        made[name]["skip_tokenizer_init"] = False
        save_words(model)
    return made


def test_every_architecture_that_generates_nothing_is_among_them(tmp_path):
    names = {row.name for row in ARCHITECTURES if "ForCausalLM" not in row.name}
    assert names <= set(runs_of(tmp_path))


def test_results_are_native_with_every_layer_encoded(tmp_path):
    runs = runs_of(tmp_path)
    native, encoded = (
        in_new_process(pool_each, list(runs.values()), env={"SCX_ENC_LAYERS": layers})
        for layers in ("", "all")
    )
    for name, (theirs, none), (ours, layers) in zip(runs, native, encoded, strict=True):
        assert (none, layers) == (0, tiny_models.SHAPE["num_hidden_layers"]), name
        expected, result = torch.tensor(theirs), torch.tensor(ours)
        assert expected.std() > 1e-3, name
        # Sums in float32 in another order.
        assert torch.allclose(result, expected, atol=1e-5, rtol=1e-4), name
