#!/usr/bin/env bash
# Llama-3-70B and Qwen2-7B on a machine with several GPUs, native and encoded:
#   run_70b.sh FOLDER_OF_MODELS [RANKS]
# The folder holds llama-3-70b and qwen2-7b; a config.json in each is enough, since
# weights are dummies. Results go to benchmark_throughput/results and *.log here.
set -euo pipefail
models=$(realpath "${1:?usage: run_70b.sh FOLDER_OF_MODELS [RANKS]}")
ranks=${2:-8}
python=${PYTHON:-python}
cd "$(dirname "$0")/.."

# A shell that waits for a command in the foreground does not pass signals on.
run() { "$python" "$@" & wait $!; }
trap 'trap "" HUP INT TERM; kill $! && wait $!; exit 130' HUP INT TERM

common=(--load-format dummy --max-num-batched-tokens 16384 --gpu-memory-utilization 0.4
  --workloads "mixed,prefill,decode1")
run -m benchmark_throughput.compare --model "$models/llama-3-70b" "${common[@]}" \
  --tensor-parallel-size "$ranks" --arm 0,79 --arm 0,79@cuda --arm off
for width in 1 2; do
  run -m benchmark_throughput.compare --model "$models/qwen2-7b" "${common[@]}" \
    --tensor-parallel-size "$width" --arm 0,27
done
for layers in "" 0 0,79; do
  case $layers in "") name=plaintext ;; 0) name=scx_input ;; *) name=scx_io ;; esac
  run benchmark_throughput/llama-70b.py --model "$models/llama-3-70b" \
    --load-format dummy --tensor-parallel-size "$ranks" --max-model-len 8192 \
    --input-len 4096 --output-len 512 --scx_enc_layers "$layers" \
    > >(tee "benchmark_throughput/70b_$name.log") 2>&1
done
