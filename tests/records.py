"""Records of the throughput benchmark, made by hand."""

from benchmark_throughput.records import Record


def record(arm, seconds, **changes):
    """A hand-made record: 1 prompt of 60 + 40 tokens, so 100 tokens per run."""
    fields = {
        "model": "model",
        "num_hidden_layers": 28,
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
        "started": "20000101T000000Z",
        "arm": arm,
        "layers": "",
        "device": "cpu",
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
