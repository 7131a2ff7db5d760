# make run      draws a picture               make explain   shows which word made which pixel
# make bug      draws it wrong, on purpose    make equation  says what a line computes
# make studio   all of it in a page           make quality   measures the mini
# make test     runs the tests                make check     ruff and mypy
# make slow     runs those that take long
# make docs     builds the book               make equations ties each equation to its line and its test
# make demo     executes the notebooks        make bench     measures the speed, beside others
# make book     builds the book and opens it  make wheel     the package, with the book in it
PYTHON ?= python3
PROMPT ?= a red apple
SEED ?= 0
BUG ?= guidance-swapped
LINE ?= $(shell sed -n 's/^make equation LINE=\([^ ]*\).*/\1/p' README.md)
# On Linux without a GPU, TORCH_INDEX=<PyTorch's CPU index, see pytorch.org> spares gigabytes of CUDA.
PIP := .venv/bin/python -m pip install --quiet --disable-pip-version-check -c constraints.txt $(if $(TORCH_INDEX),--extra-index-url $(TORCH_INDEX))

.PHONY: run explain bug equation studio test slow check demo docs book wheel equations quality bench clean

run: .venv/ready
	@.venv/bin/reifusion generate "$(PROMPT)"

explain: .venv/ready-explain
	@.venv/bin/reifusion explain words "$(PROMPT)" --seed $(SEED)

bug: .venv/ready-explain
	@.venv/bin/reifusion explain bugs "$(PROMPT)" --only $(BUG) --seed $(SEED)

equation: .venv/ready-explain
	@.venv/bin/python -m docs.equation $(LINE)

studio: .venv/ready-studio
	@.venv/bin/reifusion studio

test: .venv/ready-dev
	OMP_NUM_THREADS=1 .venv/bin/python -m pytest -n 2 -m "not slow"

slow: .venv/ready-dev
	OMP_NUM_THREADS=1 .venv/bin/python -m pytest -n 2 -m slow

check: .venv/ready-dev
	.venv/bin/ruff check .
	.venv/bin/ruff format --check .
	.venv/bin/mypy reifusion tests

demo: .venv/ready-dev
	.venv/bin/python notebooks/execute.py

docs: .venv/ready-docs
	@.venv/bin/python -m docs.build $(PAGES)

book: docs
	@.venv/bin/reifusion book

wheel: docs
	rm -rf reifusion/data/book && cp -r site reifusion/data/book
	.venv/bin/python -m pip wheel --quiet --no-deps --wheel-dir dist .; code=$$?; rm -r reifusion/data/book; exit $$code

equations: .venv/ready-dev
	.venv/bin/python -m docs.equations

quality: .venv/ready-dev
	.venv/bin/python -m bench.quality --model mini

bench: .venv/ready-dev
	.venv/bin/python -m bench.speed $(BENCH)

.venv/bin/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10) and "reifusion needs Python 3.10 or newer: make run PYTHON=python3.12")'
	$(PYTHON) -m venv .venv

.venv/ready: .venv/bin/python pyproject.toml constraints.txt
	@echo "installing what reifusion needs into .venv (once, a minute or so)"
	@.venv/bin/python -c 'import pip' 2>/dev/null || $(PYTHON) -m venv .venv  # where making it was cut short
	@$(PIP) -e .
	@touch $@

.venv/ready-explain: .venv/ready
	@echo "installing what looking inside needs"
	@$(PIP) -e ".[explain]"
	@touch $@

.venv/ready-studio: .venv/ready
	@echo "installing the studio"
	@$(PIP) -e ".[studio]"
	@touch $@

.venv/ready-dev: .venv/ready
	@echo "installing what its tests need"
	@$(PIP) -e ".[dev]"
	@touch $@

.venv/ready-docs: .venv/ready-dev
	@echo "installing what the book is built with"
	@$(PIP) -e ".[docs]"
	@touch $@

clean:
	rm -rf .venv .pytest_cache .mypy_cache .ruff_cache .hypothesis
