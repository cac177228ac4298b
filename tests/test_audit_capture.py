"""What an audit records in a real engine, against transformers and the codec."""

import contextlib
import io
import json
from collections import Counter

import pytest
import torch

from lab.engines import engine, greedy, in_new_process, shut_down
from lab.root_keys import new_key_file, root_key
from lab.tiny_models import SHAPE, VOCABULARY
from scx.audit.capture import Recorder, record
from scx.audit.public_model import PublicModel
from scx.codecs import permutation
from scx.errors import SCXUnsupportedError
from tests.kv_caches import TOLERANCE, cached_tokens

LAYERS = (0, 2)
PROMPTS = [
    [(11 * i + 5) % VOCABULARY for i in range(24)],
    [(7 * i + 3) % VOCABULARY for i in range(9)],
]


def capture(model):
    """Steps of a request alone and of two together, and the cache of the first."""
    llm = engine(model, skip_tokenizer_init=True)
    (recorder,) = llm.apply_model(lambda loaded: Recorder(loaded, LAYERS))
    greedy(llm, PROMPTS[:1], max_tokens=3)
    alone = recorder.take()

    def read(loaded):
        count = len(PROMPTS[0]) + 2
        return [
            [part.clone() for part in cached_tokens(layer.self_attn.attn.kv_cache, count)]
            for layer in loaded.model.layers
        ]

    (cache,) = llm.apply_model(read)
    greedy(llm, PROMPTS, max_tokens=1)
    together = recorder.take()
    recorder.remove()
    greedy(llm, PROMPTS, max_tokens=1)
    unwatched = recorder.take()
    shut_down(llm)
    return alone, cache, together, unwatched


@pytest.fixture(scope="module")
def key_file(tmp_path_factory):
    return new_key_file(tmp_path_factory.mktemp("keys") / "key")


@pytest.fixture(scope="module")
def recorded(tiny_llama, key_file):
    env = {"SCX_ENC_LAYERS": ",".join(map(str, LAYERS)), "SCX_KEY_FILE": str(key_file)}
    return in_new_process(capture, tiny_llama, env=env)


def test_the_record_is_what_crosses(recorded, tiny_llama, key_file):
    alone, _, together, _ = recorded
    assert [len(step.input_ids) for step in alone] == [len(PROMPTS[0]), 1, 1]
    assert [len(step.input_ids) for step in together] == [sum(map(len, PROMPTS))]
    root = root_key(key_file, tiny_llama)
    public = PublicModel(str(tiny_llama))
    step = together[0]
    texts = [torch.tensor(prompt) for prompt in PROMPTS]
    assert torch.equal(step.input_ids, torch.cat(texts))
    assert torch.equal(step.positions, torch.cat([torch.arange(len(t)) for t in texts]))
    for index in range(SHAPE["num_hidden_layers"]):
        model = public.layer(index)
        states = [model.trace(text) for text in texts]
        hidden, q, k, v = (
            torch.cat([getattr(s, name) for s in states])
            for name in ("hidden", "q", "k", "v")
        )
        torch.testing.assert_close(step.hidden[index], hidden, **TOLERANCE)
        if index not in LAYERS:
            torch.testing.assert_close(step.k[index], k, **TOLERANCE)
            torch.testing.assert_close(step.v[index], v, **TOLERANCE)
            continue
        key = permutation.derive_feature_key(root, index, range(k.shape[1]), k.shape[2])
        border = step.border[index]
        for ours, clear in ((border.q, q), (step.k[index], k), (step.v[index], v)):
            encoded = permutation.encode_features(clear.flatten(1), key)
            torch.testing.assert_close(ours.flatten(1), encoded, **TOLERANCE)
        decoded = permutation.decode_features(border.attention.flatten(1), key)
        assert torch.equal(border.output, decoded)
        assert rows_of(border.rows) == rows_of(step.hidden[index])
        assert not torch.equal(border.rows, step.hidden[index])
        with torch.no_grad():
            projected = model.attention.v_proj(border.rows)
        torch.testing.assert_close(border.qkv[:, -v[0].numel() :], projected, **TOLERANCE)
    assert set(step.border) == set(LAYERS)


def rows_of(rows):
    return Counter(row.numpy().tobytes() for row in rows)


def test_the_cache_holds_the_recorded_keys_and_values(recorded):
    alone, cache, _, _ = recorded
    for index, (k, v) in enumerate(cache):
        for held, name in ((k, "k"), (v, "v")):
            given = torch.cat([getattr(step, name)[index] for step in alone])
            assert torch.equal(held, given.flatten(1))


def test_nothing_is_recorded_once_the_recorder_is_gone(recorded):
    *_, unwatched = recorded
    assert unwatched == []


@pytest.fixture
def spoken(tiny_llama, tmp_path):
    """The tiny Llama with a tokenizer that knows the words w0 to w511."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = {f"w{i}": i for i in range(VOCABULARY)}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="w0"))  # noqa: S106
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    folder = tmp_path / "model"
    folder.mkdir()
    for file in tiny_llama.iterdir():
        (folder / file.name).symlink_to(file)
    PreTrainedTokenizerFast(tokenizer_object=tokenizer).save_pretrained(folder)
    return folder


def audit(*arguments):
    """The exit status, and what was said on stderr."""
    from scx.__main__ import main

    with contextlib.redirect_stderr(io.StringIO()) as said:
        status = main(["audit", *arguments])
    return status, said.getvalue()


def test_the_command_writes_a_report(spoken, tmp_path):
    prompts = tmp_path / "prompts.txt"
    # One has more rows than a head has features.
    lines = [
        " ".join(f"w{(7 * i + s) % VOCABULARY}" for i in range(length))
        for s, length in ((1, 12), (2, 90))
    ]
    prompts.write_text("\n".join(lines) + "\n")
    out = tmp_path / "out"
    arguments = (
        *("--model", str(spoken), "--layers", "0", "--prompts", str(prompts)),
        *("--out", str(out), "--budget", "20", "--seed", "3", "--dtype", "float32"),
    )
    assert in_new_process(audit, *arguments)[0] == 0
    report = json.loads((out / "permutation.json").read_text())
    assert report["layers"] == [0]
    assert report["codec"] == "permutation"
    assert report["prompts"] == lines
    assert report["seed"] == 3
    assert {"torch", "transformers", "scx-vllm"} <= set(report["versions"])
    found = {(f["attack"], f["label"], f["layer"]): f for f in report["findings"]}
    assert {f["adversary"] for f in report["findings"]} == {"A1", "A2", "A3"}
    for attack in (
        "dictionary of sorted values",
        "vocabulary matching, S (qkv_proj input)",
    ):
        finding = found[attack, "", 0]
        assert finding["share"] == 1
        assert finding["controls"]["random"]["share"] < 0.1
        assert finding["controls"]["wrong weights"]["share"] < 0.1
    assert found["linking the two views of V", "features", 0]["share"] == 1
    order = found["row order, by comparing bytes", "", 0]
    assert order["share"] == 1
    assert order["controls"]["random"]["share"] < 0.1
    for attack, label in (
        ("map from one step at the border", ""),
        ("map from a known prefix", "65 tokens"),
    ):
        finding = found[attack, label, 0]
        assert finding["share"] == 1
        assert finding["error"] < 1e-3
        assert finding["controls"]["random"]["share"] < 0.1
    table = (out / "permutation.md").read_text()
    assert "| 0 | A1 | dictionary of sorted values | 100.0% |" in table
    assert (out / "permutation.png").read_bytes().startswith(b"\x89PNG")


def test_layers_that_the_model_does_not_have_are_refused(spoken, tmp_path):
    out = ("--out", str(tmp_path / "out"), "--dtype", "float32")
    status, said = in_new_process(audit, "--model", str(spoken), *out, "--layers", "9")
    assert status == 1
    assert "SCX_ENC_LAYERS='9': this model has the layers" in said


def refusal(model):
    """What recording an engine of this model raises, as text."""
    try:
        record(str(model), PROMPTS, 1, dtype="float32")
    except SCXUnsupportedError as error:
        return str(error)


def test_a_model_whose_attention_the_attacks_do_not_know_is_refused_by_name(tiny):
    qwen3 = tiny("qwen3", "Qwen3ForCausalLM", head_dim=64)
    env = {"SCX_ENC_LAYERS": "0", "VLLM_CPU_KVCACHE_SPACE": "1"}
    line = in_new_process(refusal, qwen3, env=env)
    assert line.startswith(
        f"--model {str(qwen3)!r}: the attacks calculate what attention"
    )
    assert line.endswith("use one of them")
    assert len(line.splitlines()) == 1
