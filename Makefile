# make demo   the smallest run, plain and encoded, on the embedded default
# make test   the tests
# make lint   style and types
.PHONY: setup demo test lint clean

setup:
	@scripts/setup.sh

demo: setup
	.venv/bin/python test_qwen2.py --enforce-eager

test: setup
	.venv/bin/python -m pytest

lint: setup
	.venv/bin/ruff check .
	.venv/bin/ruff format --check .
	.venv/bin/pyright

clean:
	rm -rf .venv build *.egg-info .pytest_cache .ruff_cache .hypothesis
