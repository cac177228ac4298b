"""The throughput benchmark: what it accepts, its arithmetic, and one real run."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from benchmark_throughput import compare, harness
from benchmark_throughput.harness import (
    Arm,
    Record,
    UsageError,
    Workload,
    append_record,
    parse_arm,
    parse_workload,
    read_records,
)

ROOT = Path(__file__).parent.parent


def record(arm, seconds, **changes):
    """A hand-made record: 1 prompt of 60 + 40 tokens, so 100 tokens a run."""
    fields = {
        "model": "model",
        "engine_args": {
            "dtype": "float32",
            "max_model_len": 108,
            "tensor_parallel_size": 1,
            "enforce_eager": True,
        },
        "in_process": False,
        "warmups": 0,
        "seed": 0,
        "versions": {"vllm": "1"},
        "accelerator": "device",
        "cores": 1,
        "commit": None,
        "dirty": None,
        "arm": arm,
        "layers": "",
        "device": "cpu",
        "round": 1,
        "workload": "w",
        "prompts": 1,
        "input_tokens": 60,
        "output_tokens": 40,
        "counted_tokens": 100,
        "build_seconds": 1.0,
        "seconds": seconds,
        "tokens_per_second": 1.0,
        "tokens_per_second_min": 1.0,
        "tokens_per_second_max": 1.0,
        "cpu_ratio": [1.0],
        "ttft_seconds": None,
        "tpot_seconds": None,
        "crossed_bytes": None,
        "utc": "2000-01-01T00:00:00+00:00",
    }
    return Record(**(fields | changes))


def save(path, records):
    for each in records:
        append_record(each, path)
    return path


@pytest.mark.parametrize(
    ("text", "arm"),
    [
        ("0", Arm("0@cpu", "0", "cpu")),
        ("27,0,27", Arm("0,27@cpu", "0,27", "cpu")),
        ("all@cuda:1", Arm("all@cuda:1", "all", "cuda:1")),
        ("off", Arm("off", "", "cpu")),
    ],
)
def test_arms(text, arm):
    assert parse_arm(text) == arm


@pytest.mark.parametrize(
    "text", ["", "@cpu", "0@", "0,", "-1", "0-3", "off@cpu", "native", "0@cpu@cpu", "x"]
)
def test_malformed_arms_are_refused(text):
    with pytest.raises(UsageError, match="allowed are LAYERS"):
        parse_arm(text)


def test_workloads():
    assert parse_workload("mixed") == Workload("mixed", 64, 1024, 128)
    assert parse_workload("long=1x32768+1") == Workload("long", 1, 32768, 1)


@pytest.mark.parametrize("text", ["", "other", "a=1x2", "a=0x2+3", "a=1x2+0", "=1x2+3"])
def test_malformed_workloads_are_refused(text):
    with pytest.raises(UsageError, match="allowed are mixed"):
        parse_workload(text)


def test_which_tokens_count():
    assert parse_workload("mixed").counted_tokens == 64 * (1024 + 128)
    assert parse_workload("decode64").counted_tokens == 64 * 256
    assert parse_workload("decode8=8x32+16").counted_tokens == 8 * 16


def test_prompts_are_the_same_for_every_arm_and_all_unlike():
    workload = Workload("w", 4, 16, 1)
    first, again, other = (
        [p["prompt_token_ids"] for p in harness.random_prompts(workload, 512, 0, n)]
        for n in (0, 0, 1)
    )
    assert first == again
    assert len({tuple(prompt) for prompt in first + other}) == 8
    assert all(len(prompt) == 16 and max(prompt) < 512 for prompt in first)


def test_a_file_gives_back_its_records(tmp_path):
    records = [record("native", [1.0, 2.0]), record("0@cpu", [3.0], crossed_bytes=7)]
    assert read_records(save(tmp_path / "r.jsonl", records)) == records


@pytest.mark.parametrize("line", ["{", "[]", "{}", '{"arm": "native"}'])
def test_other_lines_are_refused_with_their_number(line, tmp_path):
    path = save(tmp_path / "r.jsonl", [record("native", [1.0])])
    path.write_text(path.read_text() + line + "\n")
    with pytest.raises(UsageError, match="line 2 is no record"):
        read_records(path)


def test_the_report_takes_medians_over_rounds_and_repeats():
    (comparison,) = compare.compare(
        [
            record("native", [1.0, 2.0]),  # 100 and 50 tokens/s
            record("0@cpu", [2.0, 4.0]),  # 50 and 25
            record("native", [0.5], round=2),  # 200: the median is 100
            record("0@cpu", [1.0], round=2),  # 100: the median is 50
            record("off", [1.0], round=2),
            record("native", [5.0], workload="v"),
        ]
    )
    assert comparison.arms == ["native", "0@cpu", "off"]
    assert comparison.native("w 1x60+40") == 100.0
    assert comparison.ratios("0@cpu", "w 1x60+40") == [0.25, 0.5, 1.0]
    assert compare.table(comparison) == [
        ["arm", "w 1x60+40", "v 1x60+40"],
        ["native", "100.0", "20.0"],
        ["0@cpu", "0.500 (0.250 to 1.000)", "-"],
        ["off", "1.000 (1.000 to 1.000)", "-"],
    ]


def test_unequal_settings_are_not_compared():
    records = [
        record(arm, [seconds], accelerator=accelerator)
        for accelerator, seconds in (("slow", 4.0), ("fast", 1.0))
        for arm in ("native", "0@cpu")
    ]
    slow, fast = compare.compare(records)
    assert slow.native("w 1x60+40") == 25.0
    assert slow.ratios("0@cpu", "w 1x60+40") == fast.ratios("0@cpu", "w 1x60+40") == [1]


@pytest.mark.parametrize("changes", [{}, {"prompts": 2}, {"accelerator": "other"}])
def test_missing_native_is_an_error(changes):
    records = [record("0@cpu", [1.0], **changes)]
    if changes:
        records.append(record("native", [1.0]))
    with pytest.raises(UsageError, match="no native record to compare 0@cpu with"):
        compare.compare(records)


def command(*arguments, **env):
    return subprocess.run(  # noqa: S603
        [sys.executable, "-m", "benchmark_throughput.compare", *map(str, arguments)],
        cwd=ROOT,
        env={**os.environ, "VLLM_CPU_KVCACHE_SPACE": "1", **env},
        capture_output=True,
        text=True,
    )


def test_reports_of_files(tmp_path):
    first = save(tmp_path / "1.jsonl", [record("native", [1.0])])
    second = save(tmp_path / "2.jsonl", [record("0@cpu", [2.0])])
    run = command("--report", first, second, "--markdown")
    assert run.returncode == 0, run.stderr
    assert "| native | 100.0 |\n| 0@cpu | 0.500 (0.500 to 0.500) |" in run.stdout
    run = command("--report", second)
    assert run.returncode == 2
    assert "no native record" in run.stderr


def test_the_plot_is_a_picture(tmp_path):
    pytest.importorskip("matplotlib")
    picture = tmp_path / "new" / "p.png"
    records = [record("native", [1.0]), record("0@cpu", [2.0])]
    compare.plot(compare.compare(records), picture)
    assert picture.read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--model", "/nowhere"], "no folder with a config.json"),
        (["--model", ".", "--arm", "zero"], "arm 'zero'"),
        (["--model", ".", "--arm", "0", "--arm", "0@cpu"], "more than once"),
        (["--model", ".", "--workloads", "mixed,other"], "workload 'other'"),
        (["--model", ".", "--repeats", "0"], "--repeats"),
        ([], "--model --report is required"),
    ],
)
def test_bad_usage_is_one_line_and_status_2(arguments, said):
    run = command(*arguments)
    assert run.returncode == 2
    assert said in run.stderr
    assert run.stderr.count("\n") == 1


def test_a_device_that_is_not_here_is_refused_before_anything_starts(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    run = command("--model", tmp_path, "--arm", "0@cuda:9")
    assert run.returncode == 2
    assert "arm 0@cuda:9: SCX_SECURE_DEVICE='cuda:9'" in run.stderr
    assert run.stderr.count("\n") == 1


def test_a_real_run(tiny_llama, tmp_path):
    out = tmp_path / "r.jsonl"
    size = ["--workloads", "w=2x16+4", "--repeats", 1, "--warmups", 0]
    engine = ["--dtype", "float32", "--enforce-eager"]
    run = command("--model", tiny_llama, "--arm", 0, *size, *engine, "--out", out)
    assert run.returncode == 0, run.stderr
    native, encoded = map(json.loads, out.read_text().splitlines())
    assert (native["arm"], encoded["arm"]) == ("native", "0@cpu")
    assert (native["layers"], encoded["layers"]) == ("", "0")
    for line in (native, encoded):
        assert (line["round"], line["workload"], line["prompts"]) == (1, "w", 2)
        assert line["counted_tokens"] == 2 * (16 + 4)
        (seconds,) = line["seconds"]
        assert line["tokens_per_second"] == pytest.approx(40 / seconds)
        assert line["build_seconds"] > seconds > line["ttft_seconds"] > 0
        assert line["tpot_seconds"] > 0
        assert line["cpu_ratio"][0] > 0
        assert set(line["versions"]) == {
            *("scx-vllm", "vllm", "torch", "transformers", "python")
        }
    assert native["crossed_bytes"] is None
    assert encoded["crossed_bytes"] > 0
    assert "w 2x16+4" in run.stdout
