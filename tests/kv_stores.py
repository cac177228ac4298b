"""Engines that store their KV in a folder, and read it there."""

import torch

from lab.engines import engine, greedy, shut_down, watch_rows
from lab.tiny_models import PROMPTS
from scx.plugin import kv_store

PROMPT = PROMPTS[-1]


def transfer(folder, connector="ExampleConnector", **settings):
    """Engine arguments; without a folder there is no such setting."""
    if folder is not None:
        settings |= {kv_store.FOLDER: str(folder)}
    return {
        "kv_transfer_config": {
            "kv_connector": connector,
            "kv_role": "kv_both",
            "kv_connector_extra_config": settings,
        }
    }


def run_on_store(model, folder, spoil=False):
    """Tokens for PROMPT, rows that layer 0 projected, files read from the store.

    With `spoil` all that is stored is set to zero after that, and a second triple
    says what the engine then does.
    """
    import safetensors.torch

    load, files = safetensors.torch.load_file, []

    def counted(name, *rest, **named):
        files.append(name)
        return load(name, *rest, **named)

    safetensors.torch.load_file = counted
    llm = engine(model, skip_tokenizer_init=True, **transfer(folder))
    rows = watch_rows(llm)
    results = []
    for _ in range(1 + spoil):
        (tokens,) = greedy(llm, [PROMPT])
        results.append((tokens, sum(rows), len(files)))
        rows.clear()
        files.clear()
        if spoil:
            for file in folder.rglob("*.safetensors"):
                kv = load(file)["kv_cache"]
                safetensors.torch.save_file({"kv_cache": torch.zeros_like(kv)}, file)
    shut_down(llm)
    return results
