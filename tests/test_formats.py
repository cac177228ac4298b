"""Number formats of weights, activations and caches with encoded layers.

Where a format rounds, encoded and native differ as soon as a sum in another order
falls on the other side of a rounding limit. So log-probabilities are compared, with
the error of the format itself as the measure: encoded runs have as many roundings
at the same places.
"""

import statistics

import pytest
import torch

from lab.engines import differences, in_new_process, logprobs_each
from lab.quantized_models import save_quantized
from lab.tiny_models import PROMPTS
from scx.codecs.permutation import PermutationCodec
from scx.keys import RootKey

SHORT = PROMPTS[:-1]


def native_and_encoded(runs, prompts):
    """Log-probabilities of each run; the native ones of the first are the reference."""
    runs = [{"skip_tokenizer_init": True} | run for run in runs]
    settings = {}, {"SCX_ENC_LAYERS": "all"}
    return [in_new_process(logprobs_each, runs, prompts, env=env) for env in settings]


def test_int8_weights_and_activations(tiny_llama, tmp_path):
    int8 = save_quantized(tiny_llama, tmp_path / "int8", "int8")
    # In bfloat16, the one type that vLLM's int8 kernels take on every CPU.
    runs = [{"model": model, "dtype": "bfloat16"} for model in (tiny_llama, int8)]
    native, encoded = native_and_encoded(runs, PROMPTS)
    error = statistics.mean(differences(native[1], native[0]))
    assert error > 1e-2, "not quantised"
    # Each token's activations have their own scale, whatever its row, so the levels are
    # the native ones, but where bfloat16 rounds a sum in another order otherwise: that
    # alone moves the unquantised model by a seventh of what int8 costs, and int8 to the
    # next level by a quarter. Scales of other rows would cost int8's error at least.
    between = differences(encoded[1], native[1])
    assert len(between) > 5 * 16 * len(PROMPTS) / 4
    assert statistics.mean(between) < error / 2


@pytest.mark.slow
def test_half_types(tiny_llama):
    dtypes = "float32", "float16", "bfloat16"
    runs = [{"model": tiny_llama, "dtype": dtype} for dtype in dtypes]
    native, encoded = native_and_encoded(runs, SHORT)
    for dtype, theirs, ours in zip(dtypes, native, encoded, strict=True):
        error = statistics.mean(differences(theirs, native[0]))
        found = differences(ours, native[0])
        assert len(found) > 5 * 16 * len(SHORT) / 4, dtype
        # The factor is for the spread of two means; of float32, sums in another order.
        assert statistics.mean(found) < 1.5 * error + 1e-4, dtype


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2])
def test_an_fp8_cache_rounds_encoded_keys_and_values_as_native_ones(dtype):
    """One scale per tensor or per head: rounding does not see where a feature stands."""
    features = PermutationCodec.derive(RootKey.draw(), 0, range(2), 64)
    heads = torch.randn(50, 2 * 64)
    for scale in (torch.tensor(0.5), torch.tensor([0.25, 3.0]).repeat_interleave(64)):

        def rounded(heads, scale=scale):
            return (heads / scale).to(dtype).float() * scale

        for encode in (features.encode_keys, features.encode_values):
            assert torch.equal(rounded(encode(heads)), encode(rounded(heads)))
