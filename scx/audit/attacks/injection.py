"""KV injection: have the public model repeat what a stolen cache holds."""

from typing import Any

import torch
from transformers.cache_utils import DynamicCache

from scx.audit.interface import About, Attack, Budget, Claim, Knowledge, Outcome
from scx.audit.public_model import PublicModel
from scx.audit.views import View

INSTRUCTION = "Repeat the previous content."


class Injection(Attack):
    """Loads the cache of all layers, encoded ones as they are, into the public model,
    appends an instruction to repeat, as the next turn of a chat where the model has a
    template for one, and decodes greedily.

    Source: KV injection (arXiv 2508.09442).
    """

    name = "injection"
    adversary = "A1"
    scope = "whole model"

    def run(self, knowledge: Knowledge, view: View, budget: Budget) -> Outcome:
        claims = []
        requests = sorted(range(len(view.caches)), key=lambda r: len(view.cache[r].k))
        for request in requests:
            if budget.spent():
                break
            cache = self.cache(knowledge, view, request)
            tokens = _repeat(knowledge.public, cache, len(view.cache[request].k))
            claims.append(Claim(About.TEXT, request, tokens))
        cut = f"{len(claims)} of {len(requests)} requests"
        return Outcome({"": claims}, cut if len(claims) < len(requests) else "")

    def cache(self, knowledge: Knowledge, view: View, request: int) -> DynamicCache:
        """What is loaded."""
        stolen = DynamicCache()
        for layer, cache in sorted(view.caches[request].items()):
            k, v = (part.transpose(0, 1)[None] for part in (cache.k, cache.v))
            stolen.update(k, v, layer)
        return stolen


class InjectionInTheClear(Injection):
    """The same with a cache in the clear, for which it is given the text: what the model
    repeats at best."""

    name = "injection, were the cache in the clear"
    given_text = True
    random_control = False

    def cache(self, knowledge: Knowledge, view: View, request: int) -> DynamicCache:
        length = len(view.cache[request].k)
        return knowledge.public.read(knowledge.plaintext.prefix(request, length))


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
