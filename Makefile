# make demo   the smallest run, plain and encoded, on the embedded default
# make test   the tests that end within 25 minutes on two cores
# make test-all   all of them
# make lint   style and types
.PHONY: setup demo test test-all lint clean

setup:
	@scripts/setup.sh

demo: setup
	.venv/bin/python test_qwen2.py --enforce-eager

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
