"""`vllm serve` with encoded layers answers the OpenAI client as it does without."""

import json
import math
import time
import urllib.request
from concurrent.futures import ThreadPoolExecutor

import openai
import pytest

from benchmark_throughput.records import NATIVE, parse_arm
from benchmark_throughput.serve import server
from lab.engines import EXACT_FLOAT32
from lab.prompts import MIXED
from scx.commands.demo_model import embedded_model

# Two servers start, one after the other.
pytestmark = pytest.mark.slow

ARGUMENTS = [
    "--dtype=float32",
    "--enforce-eager",
    "--max-model-len=1024",
    "--num-gpu-blocks-override=64",
    "--max-num-seqs=8",
    "--served-model-name=model",
]
ENCODED = parse_arm("0,29")
INTERVAL = 1
# Log-probabilities of float32 differ by the order of sums: docs/parity.md and the
# accuracy results have 2e-5 at most. A wrong key changes them by whole numbers.
TOLERANCE = 1e-3

# In the middle of what the model says to the first prompt, and of several tokens.
STOP = "The ans"
CHAT = [{"role": "user", "content": "Name three colours of the rainbow."}]
SCHEMA = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 12},
        "age": {"type": "integer", "minimum": 0, "maximum": 120},
    },
    "required": ["name", "age"],
    "additionalProperties": False,
}


def complete(client, prompt=MIXED[0], **request):
    """One answer of /v1/completions, at temperature 0 unless the request says more."""
    request = {"temperature": 0, "max_tokens": 10} | request
    return client.completions.create(model="model", prompt=prompt, **request)


def chat(client, **request):
    request = {"messages": CHAT, "temperature": 0, "max_tokens": 16} | request
    return client.chat.completions.create(model="model", **request)


def ends(answer):
    """What an answer says, with its length and why it ended there."""
    texts = [getattr(c, "text", None) or c.message.content for c in answer.choices]
    reasons = [(c.finish_reason, c.stop_reason) for c in answer.choices]
    return texts, reasons, answer.usage.completion_tokens


def completions(client):
    return [ends(complete(client, prompt)) for prompt in MIXED[:4]]


def many_at_once(client):
    with ThreadPoolExecutor(8) as pool:
        return list(pool.map(lambda prompt: ends(complete(client, prompt)), MIXED))


def prompt_lists(client):
    return ends(complete(client, prompt=MIXED[:4]))


def chats(client):
    longer = [*CHAT, {"role": "assistant", "content": "Red."}, CHAT[0]]
    return [ends(chat(client)), ends(chat(client, messages=longer))]


def completion_stream(client):
    stream = complete(client, stream=True, stream_options={"include_usage": True})
    chunks = list(stream)
    text = "".join(choice.text for chunk in chunks for choice in chunk.choices)
    return text, chunks[-1].usage.completion_tokens, len(chunks) > 2


def chat_stream(client):
    chunks = list(chat(client, stream=True))
    text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks)
    return text, chunks[-1].choices[0].finish_reason, len(chunks) > 2


def logprobs(client):
    found = complete(client, logprobs=5).choices[0].logprobs
    return found.tokens, found.token_logprobs, found.top_logprobs


def chat_logprobs(client):
    found = chat(client, logprobs=True, top_logprobs=5).choices[0].logprobs.content
    return [
        [(entry.token, entry.logprob) for entry in (token, *token.top_logprobs)]
        for token in found
    ]


def prompt_logprobs(client):
    # The whole prompt is computed, whatever the prefix cache holds of it.
    answer = complete(client, MIXED[-1], extra_body={"prompt_logprobs": 2})
    return [
        position and {token: entry["logprob"] for token, entry in position.items()}
        for position in answer.choices[0].prompt_logprobs
    ]


def several_samples(client):
    return [ends(ask(client, n=3, temperature=0.8, seed=7)) for ask in (complete, chat)]


def stop_strings(client):
    kept = {"include_stop_str_in_output": True}
    return [
        ends(complete(client, stop=[STOP, "zebra"])),
        ends(complete(client, stop=STOP, extra_body=kept)),
    ]


def guided_json(client):
    form = {"type": "json_schema", "json_schema": {"name": "person", "schema": SCHEMA}}
    ask = [{"role": "user", "content": "Describe a person as JSON."}]
    return ends(chat(client, messages=ask, response_format=form, max_tokens=40))


def guided_choice(client):
    choice = {"structured_outputs": {"choice": ["Berlin", "Paris", "Rome"]}}
    return ends(complete(client, extra_body=choice))


def a_closed_stream(client):
    stream = complete(
        client, max_tokens=900, stream=True, extra_body={"ignore_eos": True}
    )
    for _ in range(3):
        next(stream)
    stream.close()
    return idle(client), ends(complete(client))


def a_timed_out_request(client):
    impatient = client.with_options(timeout=1, max_retries=0)
    with pytest.raises(openai.APITimeoutError):
        complete(impatient, max_tokens=900, extra_body={"ignore_eos": True})
    return idle(client), ends(complete(client))


def a_refused_request(client):
    with pytest.raises(openai.BadRequestError) as refusal:
        complete(client, max_tokens=2000)
    return str(refusal.value), ends(complete(client))


FEATURES = [
    completions,
    many_at_once,
    prompt_lists,
    chats,
    completion_stream,
    chat_stream,
    logprobs,
    chat_logprobs,
    prompt_logprobs,
    several_samples,
    stop_strings,
    guided_json,
    guided_choice,
    a_closed_stream,
    a_timed_out_request,
    a_refused_request,
]


def metrics(client):
    """The values of /metrics by name, summed over labels."""
    address = str(client.base_url).removesuffix("/v1/")
    values = {}
    with urllib.request.urlopen(f"{address}/metrics", timeout=10) as answer:  # noqa: S310
        for line in answer.read().decode().splitlines():
            if line and not line.startswith("#"):
                name, value = line.split("{")[0].split()[0], line.split()[-1]
                values[name] = values.get(name, 0) + float(value)
    return values


def idle(client, seconds=10):
    """Whether the server stops working, long before its longest request would end."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        if metrics(client)["vllm:num_requests_running"] == 0:
            return True
        time.sleep(0.2)
    return False


@pytest.fixture(scope="module")
def served(tmp_path_factory):
    """What each server answered, by feature, its metrics and its log."""
    folder = tmp_path_factory.mktemp("serving")
    found = {}
    for arm in (NATIVE, ENCODED):
        shared = folder / f"{arm.name}.metrics"
        shared.mkdir()
        log = folder / f"{arm.name}.log"
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("HF_HUB_OFFLINE", "1")
            patch.setenv("TRITON_F32_DEFAULT", EXACT_FLOAT32)
            patch.setenv("PROMETHEUS_MULTIPROC_DIR", str(shared))
            patch.setenv("VLLM_CPU_KVCACHE_SPACE", "1")
            patch.setenv("VLLM_LOG_STATS_INTERVAL", str(INTERVAL))
            with server(arm, embedded_model("llama"), ARGUMENTS, log) as address:
                client = openai.OpenAI(base_url=f"{address}/v1", api_key="none")
                time.sleep(2 * INTERVAL)
                before = metrics(client)
                answers = {feature.__name__: feature(client) for feature in FEATURES}
                time.sleep(2 * INTERVAL)
                found[arm.name] = answers, before, metrics(client), log.read_text()
    return found


def assert_alike(ours, theirs):
    """Equal, but for numbers that are not whole: those within TOLERANCE."""
    if isinstance(ours, float) and isinstance(theirs, float):
        assert math.isclose(ours, theirs, abs_tol=TOLERANCE)
    elif isinstance(ours, dict):
        assert ours.keys() == theirs.keys()
        for key, value in ours.items():
            assert_alike(value, theirs[key])
    elif isinstance(ours, list | tuple):
        assert len(ours) == len(theirs)
        for one, other in zip(ours, theirs, strict=True):
            assert_alike(one, other)
    else:
        assert ours == theirs


@pytest.mark.parametrize("feature", [feature.__name__ for feature in FEATURES])
def test_answers_are_the_native_ones(served, feature):
    native, encoded = (served[arm.name][0][feature] for arm in (NATIVE, ENCODED))
    assert_alike(encoded, native)


def test_answers_are_what_was_asked_for(served):
    answers = served[ENCODED.name][0]
    assert answers["many_at_once"][:4] == answers["completions"]
    # Several chunks, whose text is that of the answer in one piece.
    for stream, whole in (
        ("completion_stream", answers["completions"][0]),
        ("chat_stream", answers["chats"][0]),
    ):
        assert answers[stream][-1]
        assert [answers[stream][0]] == whole[0]
    for samples, _, _ in answers["several_samples"]:
        assert len(set(samples)) > 1
    without, kept = answers["stop_strings"]
    assert without[1] == [("stop", STOP)]
    assert kept[0] == [without[0][0] + STOP]
    person = json.loads(answers["guided_json"][0][0])
    assert person.keys() == SCHEMA["properties"].keys()
    assert answers["guided_choice"][0][0] in ("Berlin", "Paris", "Rome")
    for given_up in ("a_closed_stream", "a_timed_out_request"):
        stopped, afterwards = answers[given_up]
        assert stopped
        assert afterwards == answers["completions"][0]


def test_metrics_show_what_was_done(served):
    _, before, after, _ = served[ENCODED.name]
    assert after["scx_encoded_layers"] == 2
    grown = {
        name: after[f"scx_{name}_total"] - before[f"scx_{name}_total"]
        for name in ("steps", "crossings", "bytes_in", "bytes_out", "secure_seconds")
    }
    assert min(grown.values()) > 0
    # Two fewer for a single row, if the host of a GPU is the secure device.
    assert 4 * grown["steps"] <= grown["crossings"] <= 6 * grown["steps"]
    # Positions, 8 bytes per token, come in beside the features that go both ways.
    assert grown["bytes_in"] > grown["bytes_out"]


def test_the_log_says_what_was_done(served):
    *_, log = served[ENCODED.name]
    assert "SCX, 2 layers: " in log
    assert "ms on the secure device" in log


def test_a_native_server_shows_nothing_of_it(served):
    _, _, after, log = served[NATIVE.name]
    assert not [name for name in after if name.startswith("scx")]
    assert "SCX" not in log
