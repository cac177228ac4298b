#!/usr/bin/env bash
# Qwen2-7B through lm-eval, plain and encoded: run_eval_7b.sh TASK OUTDIR
# What else can be set: run_eval.py
set -euo pipefail
export MODEL_PATH=${MODEL_PATH:-Qwen/Qwen2-7B-Instruct} TP=${TP:-1}
exec "${PYTHON:-python}" "$(dirname "$0")/run_eval.py" "$@"
