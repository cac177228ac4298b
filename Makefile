# make demo   the smallest run, plain and encoded, on the embedded default
# make eval   accuracy, plain and encoded, on the embedded default: no hub needed
# make test   the tests that end within 25 minutes on two cores
# make test-all   all of them
# make lint   style and types
.PHONY: setup demo eval test test-all lint clean

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

lint: setup
	.venv/bin/ruff check .
	.venv/bin/ruff format --check .
	.venv/bin/pyright

clean:
	rm -rf .venv build *.egg-info .pytest_cache .ruff_cache .hypothesis
