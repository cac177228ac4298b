"""The smallest run: a Qwen2 model plain and encoded, side by side.

    python test_qwen2.py [MODEL_PATH] [--enc-layers 0,27] [--secure-device cpu]

Each arm runs in a process of its own, because vLLM reads plugins once
per process. Without MODEL_PATH the embedded default is used: SmolLM2-135M from a
PyPI wheel, as a Qwen2 model.
"""

import argparse
import os
import sys
import time
from typing import Any

from lab.cli import Parser, positive
from lab.processes import in_new_process
from scx import keys
from scx.commands.demo_model import embedded_model
from scx.errors import SCXError
from scx.keys import scx_env_init

PROMPT = "The capital of France is"


def run_arm(enc_layers: str, options: argparse.Namespace) -> dict[str, Any]:
    """Text, token ids, tokens per second and crossed bytes with these layers encoded."""
    # The counters are asked for by a function that is sent to the workers.
    os.environ["VLLM_ALLOW_INSECURE_SERIALIZATION"] = "1"
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "WARNING")
    os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "2")
    scx_env_init(enc_layers, options.secure_device, options.debug)
    from vllm import LLM, SamplingParams

    llm = LLM(
        model=options.model,
        dtype=options.dtype,
        max_model_len=options.max_model_len,
        tensor_parallel_size=options.tensor_parallel_size,
        enforce_eager=options.enforce_eager,
    )
    sampling = SamplingParams(
        temperature=0.0, max_tokens=options.max_tokens, min_tokens=options.max_tokens
    )
    try:
        llm.generate([options.prompt], sampling, use_tqdm=False)
        before = sum(llm.apply_model(crossed_bytes))
        start = time.perf_counter()
        (output,) = llm.generate([options.prompt], sampling, use_tqdm=False)
        seconds = time.perf_counter() - start
        crossed = sum(llm.apply_model(crossed_bytes)) - before
    finally:
        # This process would wait for the engine's for ever when it ends.
        llm.llm_engine.engine_core.shutdown()
    return {
        "text": output.outputs[0].text,
        "tokens": list(output.outputs[0].token_ids),
        "tokens_per_second": options.max_tokens / seconds,
        "bytes": crossed,
    }


def crossed_bytes(model: Any) -> int:
    """Bytes that crossed between accelerator and secure device on this rank so far."""
    layers = getattr(model, "encoded", [])
    return sum(
        layer.secure.traffic.bytes_in + layer.secure.traffic.bytes_out for layer in layers
    )


def layers_of(options: argparse.Namespace) -> str:
    """The layers to encode: by default the first and the last.

    Raises SCXError, OSError or ValueError for options that no engine would take, before
    the first one starts.
    """
    from transformers import AutoConfig

    count = AutoConfig.from_pretrained(options.model).num_hidden_layers
    layers = options.enc_layers or f"0,{count - 1}"
    variables = {keys.ENC_LAYERS: layers, keys.SECURE_DEVICE: options.secure_device}
    keys.parse_config(variables).layers_of(count)
    return layers


def main() -> int:
    parser = Parser(description=__doc__)
    parser.add_argument("model", nargs="?", metavar="MODEL_PATH")
    parser.add_argument("--enc-layers", help="default: the first and the last layer")
    parser.add_argument("--secure-device", default="cpu")
    parser.add_argument("--debug", action="store_true", help="log every encoded layer")
    parser.add_argument("--prompt", default=PROMPT)
    parser.add_argument("--max-tokens", type=positive, default=32)
    parser.add_argument("--max-model-len", type=positive, default=2048)
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--tensor-parallel-size", type=positive, default=1)
    parser.add_argument("--enforce-eager", action="store_true")
    options = parser.parse_args()
    # In float32 the two arms differ by rounding only and give the same tokens.
    if options.model is None and options.dtype == "auto":
        options.dtype = "float32"
    try:
        options.model = options.model or str(embedded_model("qwen2"))
        layers = layers_of(options)
    except (SCXError, OSError, ValueError) as error:
        parser.error(" ".join(str(error).split()))

    print(f"Model {options.model}\nPlain run ...", flush=True)
    plain = in_new_process(run_arm, "", options)
    print(
        f"Encoded run, layers {layers}, secure device {options.secure_device} ...",
        flush=True,
    )
    encoded = in_new_process(run_arm, layers, options)

    same = sum(a == b for a, b in zip(plain["tokens"], encoded["tokens"], strict=True))
    print(f"\nPrompt:  {options.prompt!r}")
    print(f"Plain:   {plain['text']!r}")
    print(f"Encoded: {encoded['text']!r}")
    print(f"Identical tokens: {same} of {len(plain['tokens'])}")
    print(
        f"Tokens per second: plain {plain['tokens_per_second']:.1f}, "
        f"encoded {encoded['tokens_per_second']:.1f}"
    )
    print(f"Bytes that crossed: plain {plain['bytes']:,}, encoded {encoded['bytes']:,}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
