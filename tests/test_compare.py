"""The throughput benchmark: what it accepts, its arithmetic, and one real run."""

import json
import os
import re
import signal
import subprocess
import sys
import threading
from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest

from benchmark_throughput import compare, harness, ratios
from benchmark_throughput.harness import ArmFailed, ResidentArm
from benchmark_throughput.options import read_num_hidden_layers
from benchmark_throughput.records import (
    Arm,
    Workload,
    append_record,
    parse_arm,
    parse_workload,
    read_records,
)
from lab.cli import UsageError
from tests.records import record
from tests.stand_ins import alive, gone

ROOT = Path(__file__).parent.parent
SECONDS = 300
"""The most that a command takes, with engines that start beside others."""


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
        ("0@cuda:1+affine", Arm("0@cuda:1+affine", "0", "cuda:1", "affine")),
        ("all+permutation", Arm("all@cpu", "all", "cpu")),
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


def test_ratios_are_of_speeds_of_the_same_round():
    (comparison,) = ratios.compare(
        [
            record("native", [1.0, 2.0, 4.0]),  # the machine slows down
            record("0@cpu", [1.25, 4.0, 8.0]),  # and the arm is slowed as well
            # A second comparison in which an arm ran that had failed in the first.
            record("native", [10.0, 20.0], started="later"),
            record("0@cpu", [10.0, 20.0], started="later"),
            record("off", [20.0, 40.0], started="later"),
        ]
    )
    assert comparison.ratios("0@cpu", "w 1x60+40") == [0.5, 0.5, 0.8, 1.0, 1.0]
    assert comparison.ratios("off", "w 1x60+40") == [0.5, 0.5]


def test_tables():
    (comparison,) = ratios.compare(
        [
            record("0@cpu", [2.0, 2.0, 5.0], cpu_ratio=[1.0, 4.0, 2.0]),
            record("native", [1.0, 2.0, 4.0], ttft_seconds=0.25, tpot_seconds=0.0125),
            record("off", [1.0, 4.0, 2.0], ttft_seconds=1.5),
            record("native", [5.0], workload="v", cpu_ratio=[0.5]),
        ]
    )
    assert comparison.arms == ["native", "0@cpu", "off"]
    workloads = ["w 1x60+40", "v 1x60+40"]
    assert ratios.tables(comparison) == [
        [
            ["throughput", *workloads],
            ["native", "50.0", "20.0"],
            ["0@cpu", "0.800 (0.500 to 1.000)", "-"],
            ["off", "1.000 (0.500 to 2.000)", "-"],
        ],
        [
            ["TTFT, ms", *workloads],
            ["native", "250.00", "-"],
            ["0@cpu", "-", "-"],
            ["off", "1,500.00", "-"],
        ],
        [
            ["TPOT, ms", *workloads],
            ["native", "12.50", "-"],
            ["0@cpu", "-", "-"],
            ["off", "-", "-"],
        ],
        [
            ["CPU cores", *workloads],
            ["native", "1.00", "0.50"],
            ["0@cpu", "2.00", "-"],
            ["off", "1.00", "-"],
        ],
    ]


def curve(name, *records):
    (comparison,) = ratios.compare(list(records))
    return ratios.curve_points(comparison, ratios.CURVES[name])


def test_a_curve_over_layers():
    assert curve(
        "layers",
        record("native", [1.0]),
        record("off", [1.0]),
        record("all@cpu", [4.0], layers="all"),
        record("0@cpu", [1.0], layers="0"),
        record("0,27@cpu", [2.0], layers="0,27"),
        record("0@cuda", [1.0], layers="0", device="cuda"),
    ) == {"w 1x60+40 @cpu": {1: [1.0], 2: [0.5], 28: [0.25]}}


def test_curves_over_input_and_prompts():
    records = [
        record(arm, [seconds * factor], workload=name, prompts=prompts, input_tokens=n)
        for name, prompts, n, seconds in (
            ("long", 1, 2048, 4.0),
            ("short", 1, 1024, 1.0),
            ("many", 8, 1024, 2.0),
        )
        for arm, factor in (("native", 1.0), ("0@cpu", seconds))
    ]
    assert curve("input", *records) == {"0@cpu 1xN+40": {1024: [1.0], 2048: [0.25]}}
    assert curve("prompts", *records) == {"0@cpu Nx1024+40": {1: [1.0], 8: [0.5]}}
    with pytest.raises(UsageError, match="no curve over encoded layers"):
        curve("layers", *records)


def test_unequal_settings_are_not_compared():
    records = [
        record(arm, [seconds], accelerator=accelerator)
        for accelerator, seconds in (("slow", 4.0), ("fast", 1.0))
        for arm in ("native", "0@cpu")
    ]
    slow, fast = ratios.compare(records)
    assert slow.native("w 1x60+40") == 25.0
    assert slow.ratios("0@cpu", "w 1x60+40") == fast.ratios("0@cpu", "w 1x60+40") == [1]


@pytest.mark.parametrize(
    "changes", [{}, {"prompts": 2}, {"accelerator": "other"}, {"started": "later"}]
)
def test_missing_native_is_an_error(changes):
    records = [record("0@cpu", [1.0], **changes)]
    if changes:
        records.append(record("native", [1.0]))
    with pytest.raises(UsageError, match="no native record to compare 0@cpu with"):
        ratios.compare(records)


def test_in_turn():
    assert [compare.in_turn(["a", "b"], n) for n in range(4)] == [
        ["a", "b"],
        ["b", "a"],
        ["b", "a"],
        ["a", "b"],
    ]
    assert len({tuple(compare.in_turn([1, 2, 3], n)) for n in range(6)}) == 6


def fake_serve(pipe, arm, plan):
    """Obeys as an engine does, with an engine's process that outlives it."""
    os.setpgrp()
    engine = os.fork()
    if engine == 0:
        signal.pause()
    pipe.send(float(engine))
    workload, number = pipe.recv()
    if workload == "raise":
        pipe.send(ArmFailed("the reason"))
    elif workload == "die":
        os._exit(number)
    elif workload == "log":
        for error in ("OutOfMemoryError: the cause", "RuntimeError: what follows"):
            print(f"(EngineCore pid=1) ERROR [core.py:9] torch.{error}", file=sys.stderr)
        pipe.send(ArmFailed("see above"))
    pipe.send(number)
    pipe.recv()


@pytest.fixture
def resident(monkeypatch):
    monkeypatch.setattr(harness, "serve", fake_serve)
    monkeypatch.setattr(harness, "CLOSE_SECONDS", 1.0)
    resident = ResidentArm(Arm("0@cpu", "0", "cpu"), None)
    resident.wait_until_built()
    yield resident
    resident.close()
    assert gone([int(resident.build_seconds)])


def test_a_resident_arm_answers_and_leaves_no_process(resident):
    assert alive(int(resident.build_seconds))
    assert resident.run("work", 3) == 3


@pytest.mark.parametrize(
    ("workload", "said"),
    [
        ("raise", "^the reason$"),
        ("die", "^its process ended with status 3$"),
        ("log", "^see above; its first error: torch.OutOfMemoryError: the cause$"),
    ],
)
def test_an_arm_that_fails_is_closed_and_says_why(workload, said, resident):
    with pytest.raises(ArmFailed, match=said):
        resident.run(workload, 3)
    assert gone([int(resident.build_seconds)])


def start(*arguments, **options):
    return subprocess.Popen(  # noqa: S603
        [sys.executable, "-m", "benchmark_throughput.compare", *map(str, arguments)],
        **options,
        cwd=ROOT,
        env={**os.environ, "VLLM_CPU_KVCACHE_SPACE": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def command(*arguments):
    process = start(*arguments)
    try:
        stdout, stderr = process.communicate(timeout=SECONDS)
    finally:
        process.kill()
    return subprocess.CompletedProcess(arguments, process.returncode, stdout, stderr)


def test_reports_of_files(tmp_path):
    first = save(tmp_path / "1.jsonl", [record("native", [1.0])])
    second = save(tmp_path / "2.jsonl", [record("0@cpu", [2.0])])
    run = command("--report", first, second, "--markdown")
    assert run.returncode == 0, run.stderr
    rows = [re.split(r" +\| +", line.strip("| ")) for line in run.stdout.splitlines()]
    assert ["throughput", "w 1x60+40"] in rows
    assert rows[rows.index(["native", "100.0"]) + 1] == [
        "0@cpu",
        "0.500 (0.500 to 0.500)",
    ]
    assert ["TPOT, ms", "w 1x60+40"] in rows
    run = command("--report", second)
    assert run.returncode == 2
    assert "no native record" in run.stderr


@pytest.fixture
def drawn(tmp_path, monkeypatch):
    """What is drawn of records, as matplotlib's axes."""
    pyplot = pytest.importorskip("matplotlib.pyplot")
    figures = []
    monkeypatch.setattr(pyplot, "close", figures.append)

    def draw(curve):
        picture = tmp_path / "new" / "p.png"
        records = [
            record("native", [1.0, 1.0]),
            record("0@cpu", [2.0, 4.0], layers="0"),
            record("0,27@cpu", [4.0, 4.0], layers="0,27"),
        ]
        ratios.plot(ratios.compare(records), picture, curve)
        assert picture.read_bytes().startswith(b"\x89PNG")
        (figure,) = figures
        (axes,) = figure.axes
        assert axes.get_ylabel() == "throughput, ratio to native"
        assert axes.get_title(loc="left").startswith("model on device, 1 cores")
        return axes

    return draw


def test_bars_are_median_ratios_and_their_spread(drawn):
    axes = drawn(None)
    assert [bar.get_height() for bar in axes.patches] == [0.375, 0.25]
    assert [text.get_text() for text in axes.texts] == ["0.38", "0.25"]
    spreads = [lines.get_segments()[0][:, 1].tolist() for lines in axes.collections]
    assert spreads == [[0.25, 0.5], [0.25, 0.25]]
    assert axes.get_legend_handles_labels()[1] == ["native", "0@cpu", "0,27@cpu"]
    assert [x.get_text() for x in axes.get_xticklabels()] == ["w 1x60+40\n100"]


def test_curves_are_median_ratios_over_layers(drawn):
    axes = drawn("layers")
    ((line, _, (spread,)),) = axes.containers
    assert line.get_xydata().tolist() == [[1, 0.375], [2, 0.25]]
    assert [ends[:, 1].tolist() for ends in spread.get_segments()] == [
        [0.25, 0.5],
        [0.25, 0.25],
    ]
    assert axes.get_xlabel() == "encoded layers"
    assert "w 1x60+40 @cpu" in axes.get_legend_handles_labels()[1]


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--model", "/nowhere"], "no folder with a config.json"),
        (["--model", ".", "--arm", "zero"], "arm 'zero'"),
        (["--model", ".", "--arm", "0", "--arm", "0@cpu"], "more than once"),
        (["--model", ".", "--workloads", "mixed,other"], "workload 'other'"),
        (["--model", ".", "--repeats", "0"], "--repeats"),
        (["--report", "x", "--curve", "layers"], "--curve needs --plot"),
        ([], "--model --report is required"),
    ],
)
def test_bad_usage_is_one_line_and_status_2(arguments, said, capsys):
    with pytest.raises(SystemExit, match="2"):
        compare.main(arguments)
    captured = capsys.readouterr()
    assert said in captured.err
    assert captured.err.count("\n") == 1
    assert captured.out == ""


@pytest.mark.parametrize(
    ("config", "said"),
    [
        ("[]", "no folder with a config.json"),
        ("{}", "no folder with a config.json"),
        ('{"num_hidden_layers": null}', "num_hidden_layers=None in config.json"),
        ('{"num_hidden_layers": -1}', "num_hidden_layers=-1 in config.json"),
        ('{"num_hidden_layers": "4"}', "num_hidden_layers='4' in config.json"),
        ('{"text_config": 7}', "no folder with a config.json"),
    ],
)
def test_what_is_no_number_of_layers_is_refused(config, said, tmp_path):
    (tmp_path / "config.json").write_text(config)
    with pytest.raises(UsageError, match=said):
        read_num_hidden_layers(tmp_path)
    (tmp_path / "config.json").write_text('{"text_config": {"num_hidden_layers": 2}}')
    assert read_num_hidden_layers(tmp_path) == 2


def test_a_device_that_is_not_here_is_refused_before_anything_starts(tmp_path):
    (tmp_path / "config.json").write_text('{"num_hidden_layers": 2}')
    run = command("--model", tmp_path, "--arm", "0@cuda:9")
    assert run.returncode == 2
    assert "arm 0@cuda:9: SCX_SECURE_DEVICE='cuda:9'" in run.stderr
    assert run.stderr.count("\n") == 1


SMALL = [
    *("--workloads", "w=2x16+4,v=1x8+2", "--repeats", 2, "--warmups", 1),
    *("--dtype", "float32", "--enforce-eager"),
]


def test_a_real_run(tiny_llama, tmp_path):
    """An arm that cannot be built does not stop the others."""
    out = tmp_path / "r.jsonl"
    arms = ["--arm", 0, "--arm", "off", "--arm", 99, "--starts", 3]
    memory = ["--kv-cache-memory-bytes", 2**28]
    run = command("--model", tiny_llama, *arms, *SMALL, *memory, "--out", out)
    assert run.returncode == 1, run.stderr
    (said,) = (line for line in run.stderr.splitlines() if line.startswith("arm 99@cpu"))
    assert said.startswith("arm 99@cpu failed while its engine was built: ")
    lines = [json.loads(line) for line in out.read_text().splitlines()]
    assert [(line["workload"], line["arm"], line["layers"]) for line in lines] == [
        (workload, arm, layers)
        for workload in ("w", "v")
        for arm, layers in (("native", ""), ("0@cpu", "0"), ("off", ""))
    ]
    assert len({line["started"] for line in lines}) == 1
    for line in lines:
        tokens = {"w": 2 * (16 + 4), "v": 8 + 2}[line["workload"]]
        assert line["counted_tokens"] == tokens
        assert line["num_hidden_layers"] == 4
        assert line["engine_args"]["kv_cache_memory_bytes"] == 2**28
        assert len(line["seconds"]) == len(line["cpu_ratio"]) == 2
        assert line["tokens_per_second_min"] == tokens / max(line["seconds"])
        assert line["tokens_per_second_max"] == tokens / min(line["seconds"])
        assert line["build_seconds"] > max(line["seconds"])
        assert max(line["seconds"]) > line["ttft_seconds"] > 0
        assert line["tpot_seconds"] > 0
        assert min(line["cpu_ratio"]) >= 0
        assert set(line["versions"]) == {
            *("scx-vllm", "vllm", "torch", "transformers", "python")
        }
        if line["layers"]:
            # Two rounds. What a step moves is proportional to its tokens, and the
            # last output token is not fed back: 2 x (16 + 3) in w, 8 + 1 in v.
            steps = {"w": 2 * 2 * (16 + 3), "v": 2 * (8 + 1)}[line["workload"]]
            assert line["crossed_bytes"] % steps == 0
            assert line["crossed_bytes"] > 0
        else:
            assert line["crossed_bytes"] is None
    assert "w 2x16+4" in run.stdout


@pytest.mark.parametrize(("failures", "status"), [(0, 0), (1, 1), (2, 1)])
def test_the_status_says_whether_an_arm_failed(failures, status, monkeypatch, tmp_path):
    plan = SimpleNamespace(out=save(tmp_path / "r.jsonl", [record("native", [1.0])]))
    monkeypatch.setattr(compare, "make_plan", lambda *_: plan)
    monkeypatch.setattr(compare, "run_arms", lambda *_: failures)
    assert compare.benchmark(compare.parser().parse_args(["--model", "m"])) == status


@pytest.mark.parametrize(
    "number", [signal.SIGINT, pytest.param(signal.SIGKILL, marks=pytest.mark.slow)]
)
def test_no_process_outlives_the_command(number, tiny_llama, tmp_path):
    """Started in background, where SIGINT is ignored; tests/test_processes.py has other
    signals and commands, with stand-ins for engines."""
    out = tmp_path / "r.jsonl"
    arguments = ["--model", tiny_llama, "--arm", 0, *SMALL, "--out", out]
    run = start(
        *arguments, preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_IGN)
    )
    watch = threading.Timer(SECONDS, run.kill)
    watch.start()
    try:
        for line in run.stderr:
            if line.startswith("arm native: built"):
                break
        children = psutil.Process(run.pid).children(recursive=True)
        assert len(children) > 2
        # The other engine is being built.
        run.send_signal(number)
        assert run.wait() == (130 if number == signal.SIGINT else -number)
    finally:
        watch.cancel()
        run.kill()
    assert gone([each.pid for each in children])
