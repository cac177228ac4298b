#!/usr/bin/env bash
# Qwen2-1.5B through lm-eval, plain and encoded: run_eval_1.5b.sh TASK OUTDIR
# What else can be set: run_eval.py
set -euo pipefail
export MODEL_PATH=${MODEL_PATH:-Qwen/Qwen2-1.5B-Instruct} TP=${TP:-1}
exec "${PYTHON:-python}" "$(dirname "$0")/run_eval.py" "$@"
