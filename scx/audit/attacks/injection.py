"""KV injection: have the public model repeat what a stolen cache holds."""

from typing import Any

import torch
from transformers.cache_utils import DynamicCache

from scx.audit.interface import About, Attack, Budget, Claim, Knowledge, Outcome
from scx.audit.public_model import PublicModel
from scx.audit.views import Cache, View

INSTRUCTION = "Repeat the previous content."


class Injection(Attack):
    """Loads the cache of all layers, encoded ones as they are, into the public model,
    appends an instruction to repeat, as the next turn of a chat where the model has a
    template for one, and decodes greedily.

    The line for a cache in the clear is what the model can repeat at best; for it the
    attack is given the text.

    Source: KV injection (arXiv 2508.09442).
    """

    name = "injection"
    adversary = "A1"
    scope = "whole model"

    def run(self, knowledge: Knowledge, view: View, budget: Budget) -> Outcome:
        encoded, clear = [], []
        requests = sorted(range(len(view.caches)), key=lambda r: len(view.cache[r].k))
        for request in requests:
            if budget.spent():
                break
            length = len(view.cache[request].k)
            stolen = _load(view.caches[request])
            tokens = _repeat(knowledge.public, stolen, length)
            encoded.append(Claim(About.TEXT, request, tokens))
            ids = knowledge.plaintext.prefix(request, length)
            read = knowledge.public.read(ids)
            clear.append(
                Claim(About.TEXT, request, _repeat(knowledge.public, read, length))
            )
        cut = f"{len(encoded)} of {len(requests)} requests"
        return Outcome(
            {"": encoded, "a cache in the clear": clear},
            cut if len(encoded) < len(requests) else "",
        )


def _load(caches: dict[int, Cache]) -> DynamicCache:
    stolen = DynamicCache()
    for layer, cache in sorted(caches.items()):
        k, v = (part.transpose(0, 1)[None] for part in (cache.k, cache.v))
        stolen.update(k, v, layer)
    return stolen


def _instruction(tokenizer: Any) -> list[int]:
    """Ids that end a turn which the cache is taken to hold, ask, and begin the answer."""
    text = f"\n{INSTRUCTION}\n"
    if tokenizer.chat_template:
        turns = [{"role": "user", "content": part} for part in ("CACHED", INSTRUCTION)]
        text = tokenizer.apply_chat_template(
            turns, tokenize=False, add_generation_prompt=True
        ).partition("CACHED")[2]
    return tokenizer.encode(text, add_special_tokens=False)


@torch.inference_mode()
def _repeat(public: PublicModel, cache: DynamicCache, length: int) -> torch.Tensor:
    """`length` greedy tokens after the instruction."""
    fed, tokens = torch.tensor([_instruction(public.tokenizer)]), []
    for _ in range(length):
        fed = public.causal(fed, past_key_values=cache).logits[:, -1:].argmax(-1)
        tokens.append(int(fed))
    return torch.tensor(tokens)
