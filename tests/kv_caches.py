"""What the engine of a test has cached, and what that must be."""

import torch

from lab.engines import engine, greedy, shut_down
from lab.tiny_models import SHAPE

LAYERS = SHAPE["num_hidden_layers"]
PROMPT = [(11 * i + 5) % SHAPE["vocab_size"] for i in range(48)]

DECODED = 8
EAGER = {"enforce_eager": True}

# Sums of 64 products in another order: 64 x 2^-24 relative to values of size 1 to 10.
TOLERANCE = {"rtol": 1e-4, "atol": 1e-4}


def caches(model, arguments=EAGER):
    """Raw K and V of each layer for PROMPT and DECODED tokens more, and what they
    decode to: (tokens, M x D)."""
    llm = engine(model, skip_tokenizer_init=True, block_size=128, **arguments)
    greedy(llm, [PROMPT], max_tokens=DECODED + 1)

    def read(loaded):
        result = []
        for layer in loaded.model.layers:
            attention = layer.self_attn
            raw = cached_tokens(attention.attn.kv_cache, len(PROMPT) + DECODED)
            secure = getattr(attention, "secure", None)
            decoded = raw
            if secure:
                features, (k, v) = secure.features.to(torch.device("cpu")), raw
                decoded = [features.decode_keys(k), features.decode_values(v)]
            result.append({"raw": raw, "decoded": decoded})
        return result

    result = llm.apply_model(read)[0]
    shut_down(llm)
    return result


def cached_tokens(kv_cache, count):
    """K and V of the only request that ran, in one block: (tokens, M x D), on the CPU.

    The cache is (blocks, M, slots, 2 x D), in vLLM's Triton backend K beside V. In its
    CPU backend the memory of a block and head is first K as (D, slots), then V as
    (slots, D), the "vec" form for float32.
    """
    block = next(block for block in kv_cache[1:] if block.any())
    heads, slots, width = block.shape
    if block.is_cuda:
        k, v = block.cpu().transpose(0, 1).chunk(2, dim=2)
    else:
        k, v = block.chunk(2, dim=1)
        k = k.reshape(heads, width // 2, slots).permute(2, 0, 1)
        v = v.reshape(heads, slots, width // 2).permute(1, 0, 2)
    return [half[:count].flatten(1).clone() for half in (k, v)]


def assert_encoded(layers, encoded, native):
    """Exactly `layers` hold something else than the native cache, and decode to it."""
    for index in range(LAYERS):
        for kind in ("raw", "decoded"):
            for ours, theirs in zip(
                encoded[index][kind], native[index]["raw"], strict=True
            ):
                if kind == "raw" and index in layers:
                    assert (ours - theirs).abs().max() > 0.1
                elif index < min(layers, default=LAYERS):
                    assert torch.equal(ours, theirs)
                else:
                    torch.testing.assert_close(ours, theirs, **TOLERANCE)
