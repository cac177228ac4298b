"""Prompts have exactly the length asked for, in two tokenizers of different kinds."""

import json
import subprocess
import sys
from itertools import islice
from pathlib import Path

import pytest
from tokenizers import Tokenizer, models, normalizers, processors, trainers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from data import make_prompts, prompts
from data.prompts import count_tokens, load_prompt, make_prompt
from lab.engines import engine, in_new_process
from lab.tiny_models import VOCABULARY
from scx.commands.demo_model import embedded_model
from scx.errors import SCXError

DATA = Path(prompts.__file__).parent
FILES = json.loads((DATA / "prompts.json").read_text())
BOS, UNKNOWN = "<s>", "<unk>"
BLOCK = 16  # vLLM's prefix cache shares blocks of so many tokens


def save_unigram(folder):
    """As Llama's SentencePiece: a space is a letter, and <s> comes first."""
    tokenizer = Tokenizer(models.Unigram())
    tokenizer.normalizer = normalizers.Sequence(
        [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
    )
    trainer = trainers.UnigramTrainer(
        vocab_size=VOCABULARY, special_tokens=[BOS, UNKNOWN], unk_token=UNKNOWN
    )
    tokenizer.train_from_iterator([text(100)], trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{BOS} $A", special_tokens=[(BOS, 0)]
    )
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token=BOS, unk_token=UNKNOWN
    ).save_pretrained(folder)


def text(entries):
    return "".join(islice(prompts._entries("text of a test"), entries))


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    unigram = tmp_path_factory.mktemp("unigram")
    save_unigram(unigram)
    return {"bpe": embedded_model("llama"), "unigram": unigram}


@pytest.fixture(scope="module", params=["bpe", "unigram"])
def tokenizer(request, folders):
    return AutoTokenizer.from_pretrained(folders[request.param])


def test_the_tokenizers_differ_in_kind(folders):
    bpe, unigram = (AutoTokenizer.from_pretrained(folder) for folder in folders.values())
    assert (count_tokens(bpe, ""), count_tokens(unigram, "")) == (0, 1)
    assert unigram.encode("a")[0] == unigram.bos_token_id
    assert count_tokens(bpe, text(5)) != count_tokens(unigram, text(5))


@pytest.mark.parametrize("length", [17, 1000, 1024, 4097])
def test_a_made_prompt_is_exact(length, tokenizer):
    prompt = make_prompt(tokenizer, length)
    assert len(tokenizer.encode(prompt)) == length
    assert prompt == prompt.strip()
    assert prompt == make_prompt(tokenizer, length, seed=0)
    assert prompt != make_prompt(tokenizer, length, seed=1)


def test_every_length_of_a_range_is_exact(tokenizer):
    # All kinds of ends: within words and numbers, between sentences and paragraphs.
    for length in range(150, 300):
        assert len(tokenizer.encode(make_prompt(tokenizer, length))) == length


@pytest.mark.parametrize("name", FILES)
def test_the_files_are_what_their_description_says(name, folders):
    made = FILES[name]
    assert made["tokenizer"] == folders["bpe"].name
    tokenizer = AutoTokenizer.from_pretrained(folders["bpe"])
    content = (DATA / name).read_bytes().decode()
    assert len(tokenizer.encode(content)) == made["length"]
    assert content == make_prompt(tokenizer, made["length"], made["seed"])
    assert load_prompt(DATA / name, tokenizer, made["length"]) == content


def test_the_files_are_the_promised_ones():
    lengths = {"1k": 1024, "4k": 4096, "8k": 8192, "32k": 32768}
    assert {name: made["length"] for name, made in FILES.items()} == {
        f"prompt_{size}.txt": length for size, length in lengths.items()
    }


@pytest.mark.parametrize("length", [5, 100, 1023, 1024, 1025, 5000])
@pytest.mark.parametrize("number", [0, 3])
def test_a_file_is_fitted_to_the_length(length, number, tokenizer):
    path = DATA / "prompt_1k.txt"
    prompt = load_prompt(path, tokenizer, length, number)
    assert len(tokenizer.encode(prompt)) == length
    content = path.read_text()
    if number == 0:
        # The end may be another mark, by which the length is met.
        same = min(len(prompt), len(content)) - 20
        assert prompt[: max(0, same)] == content[: max(0, same)]
    elif length > 1024 and len(prompt) > 2 * len(content):
        assert content in prompt


def test_a_file_of_any_text_is_fitted(tokenizer, tmp_path):
    path = tmp_path / "own.txt"
    path.write_bytes("Zażółć gęślą jaźń, 水的化学式是\r\nH2O. ".encode())
    for length in (5, 12, 300):
        assert len(tokenizer.encode(load_prompt(path, tokenizer, length))) == length


def test_prompts_begin_with_unlike_blocks(tokenizer):
    path = DATA / "prompt_1k.txt"
    several = [load_prompt(path, tokenizer, 256, number) for number in range(1, 64)]
    several += [make_prompt(tokenizer, length) for length in (1024, 4096, 8192)]
    several.append(make_prompt(tokenizer, 1024, seed=1))
    blocks = {tuple(tokenizer.encode(each)[:BLOCK]) for each in several}
    assert len(blocks) == len(several)


def test_too_short_a_length_is_refused(folders):
    unigram = AutoTokenizer.from_pretrained(folders["unigram"])
    with pytest.raises(SCXError, match="1 tokens: of this tokenizer, from 2"):
        make_prompt(unigram, 1)


@pytest.mark.parametrize("content", [None, b"\xff\xfe"])
def test_a_file_that_cannot_be_read_is_refused(content, tokenizer, tmp_path):
    path = tmp_path / "p.txt"
    if content:
        path.write_bytes(content)
    with pytest.raises(SCXError, match=r"no prompt in .*p\.txt .*make_prompts\.py makes"):
        load_prompt(path, tokenizer, 10)


def tokens_in_vllm(model, tokenizer, prompt):
    llm = engine(model, tokenizer=str(tokenizer))
    (output,) = llm.generate([prompt], use_tqdm=False)
    return len(output.prompt_token_ids)


def test_vllm_sees_the_length(tiny_llama, folders):
    """Where a special token is added, which the other tokenizer does not do."""
    tokenizer = AutoTokenizer.from_pretrained(folders["unigram"])
    prompt = load_prompt(DATA / "prompt_4k.txt", tokenizer, 777)
    run = tokens_in_vllm, tiny_llama, folders["unigram"], prompt
    assert in_new_process(*run) == 777


def test_the_script(folders, tmp_path):
    out = tmp_path / "new"
    arguments = ["--tokenizer", str(folders["unigram"]), "--out", str(out)]
    command = [sys.executable, str(DATA / "make_prompts.py"), *arguments]
    subprocess.run([*command, "--lengths", "1024,1000"], check=True)  # noqa: S603
    assert make_prompts.main([*arguments, "--lengths", "300", "--seed", "5"]) == 0
    names = {"prompt_1k.txt": 1024, "prompt_1000.txt": 1000, "prompt_300.txt": 300}
    assert {path.name for path in out.iterdir()} == {*names, "prompts.json"}
    described = json.loads((out / "prompts.json").read_text())
    tokenizer = AutoTokenizer.from_pretrained(folders["unigram"])
    for name, length in names.items():
        assert described[name]["length"] == length
        assert described[name]["tokenizer"] == folders["unigram"].name
        assert described[name]["seed"] == (5 if length == 300 else 0)
        assert len(tokenizer.encode((out / name).read_bytes().decode())) == length


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--tokenizer", "/nowhere"], "--tokenizer '/nowhere': there is none"),
        (["--lengths", "1k"], "argument --lengths: '1k' is not like 1024,4096"),
        (["--lengths", "0"], "argument --lengths: '0'"),
        (["--out", __file__], "File exists"),
    ],
)
def test_bad_usage_is_one_line_and_status_2(arguments, said, capsys):
    with pytest.raises(SystemExit) as exit_:
        make_prompts.main(arguments)
    assert exit_.value.code == 2
    error = capsys.readouterr().err
    assert said in error
    assert error.count("\n") == 1


def test_a_description_that_is_not_json_is_refused(tmp_path, capsys):
    (tmp_path / "prompts.json").write_text("{")
    with pytest.raises(SystemExit):
        make_prompts.main(["--lengths", "20", "--out", str(tmp_path)])
    assert "prompts.json is not JSON" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["prompts.json"]
