# make demo   the smallest run, plain and encoded, on the embedded default
# make eval   accuracy, plain and encoded, on the embedded default: no hub needed
# make test   the tests that end within 25 minutes on two cores
# make test-all   all of them
# make test-gpu   the tests that need an NVIDIA GPU, with their record
# make lint   style, types, shell scripts and secrets
# make dist   the sdist and the wheel, reproducibly
# make wheel-test   the wheel in an empty environment
# make ci     lint, wheel-test and test: what has to pass before a change is merged
.PHONY: setup demo eval test test-all test-gpu lint dist wheel-test ci clean

setup:
	@scripts/setup.sh

demo: setup
	.venv/bin/python test_qwen2.py --enforce-eager

eval: setup
	MODEL_PATH="$$(.venv/bin/python -m scx demo-model)" DTYPE=float32 LIMIT=40 \
	  MODEL_ARGS=enforce_eager=True,max_model_len=512 PYTHON=.venv/bin/python \
	  benchmark_acc/run_eval_1.5b.sh pydoc build/eval
	.venv/bin/python benchmark_acc/report.py build/eval

test: setup
	.venv/bin/python -m pytest -m "not slow"

test-all: setup
	.venv/bin/python -m pytest

test-gpu: setup
	.venv/bin/python -m pytest -m gpu --record docs/gpu-tests.json
	.venv/bin/python -m scripts.gpu_tests

lint: setup
	.venv/bin/ruff check .
	.venv/bin/ruff format --check .
	.venv/bin/pyright
	git grep -lz '^#!.*sh$$' | xargs -0 .venv/bin/shellcheck
	git ls-files -z | xargs -0 .venv/bin/detect-secrets-hook --baseline .secrets.baseline

dist: setup
	rm -rf dist
	scripts/build.sh dist

wheel-test: dist
	PYTHON=.venv/bin/python scripts/wheel_test.sh dist/*.whl

ci: lint wheel-test test

clean:
	rm -rf .venv build dist *.egg-info .pytest_cache .ruff_cache .hypothesis
