#!/usr/bin/env bash
# Llama-70B through lm-eval, plain and encoded: run_eval_70b.sh TASK OUTDIR
# What else can be set: run_eval.py
set -euo pipefail
export MODEL_PATH=${MODEL_PATH:-meta-llama/Llama-3.3-70B-Instruct} TP=${TP:-4}
exec "${PYTHON:-python}" "$(dirname "$0")/run_eval.py" "$@"
