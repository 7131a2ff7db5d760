# make run   draws a picture          make test  runs the tests
# make check ruff and mypy            make demo  executes the notebook
# make docs  builds the book          make equations  ties each equation to its line and its test
# make quality  measures the mini
PYTHON ?= python3
PROMPT ?= a cat stretching on the floor
# On Linux without a GPU, TORCH_INDEX=<PyTorch's CPU index, see pytorch.org> spares gigabytes of CUDA.
PIP := .venv/bin/python -m pip install --quiet --disable-pip-version-check -c constraints.txt $(if $(TORCH_INDEX),--extra-index-url $(TORCH_INDEX))

.PHONY: run test check demo docs equations quality clean

run: .venv/ready
	@.venv/bin/reifusion generate "$(PROMPT)" --cfg 4

test: .venv/ready-dev
	.venv/bin/python -m pytest

check: .venv/ready-dev
	.venv/bin/ruff check .
	.venv/bin/ruff format --check .
	.venv/bin/mypy reifusion tests

demo: .venv/ready-dev
	.venv/bin/jupyter-execute --inplace demo.ipynb

docs: .venv/ready-docs
	.venv/bin/python -m mkdocs build --strict

equations: .venv/ready-dev
	.venv/bin/python -m docs.equations

quality: .venv/ready-dev
	.venv/bin/python -m bench.quality --model mini

.venv/bin/python:
	$(PYTHON) -m venv .venv

.venv/ready: .venv/bin/python pyproject.toml constraints.txt
	@echo "installing what reifusion needs into .venv (once, a minute or so)"
	@$(PIP) -e .
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
