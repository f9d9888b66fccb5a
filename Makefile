# From a fresh clone with Python 3.11 and pip; CI calls the same targets.
#   make demo     the main job on the embedded model: a table and a picture
#   make test     the tests (CPU, offline after the install); `make heavy` adds those with real weights
#   make lmms     the tests of the lmms-eval model, in an environment of its own: .venv-lmms
#   make matrix   every method on every family by the contract tests; writes foveate/matrix.json
#   make check    lint, format, types; changes nothing     make fix    what can be fixed by itself

PYTHON ?= $(shell command -v python3.11 || command -v python3)
BIN := .venv/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check install --quiet -c constraints.txt

.PHONY: demo test heavy lmms matrix check fix clean

demo: .venv/demo
	$(BIN)/foveate demo

test: .venv/dev
	$(BIN)/python -m pytest -n 2

heavy: .venv/dev
	$(BIN)/python -m pytest -m heavy

lmms: .venv-lmms/ready
	.venv-lmms/bin/python -m pytest tests/test_lmms.py

matrix: .venv/dev
	$(BIN)/python -m pytest -n 2 -m "not heavy" --write-matrix \
		tests/test_contract.py tests/test_mixed.py tests/test_training.py \
		tests/test_encoded.py tests/test_search.py tests/test_cli_search.py

check: .venv/dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

fix: .venv/dev
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:
	rm -rf .venv .venv-lmms .mypy_cache .pytest_cache .ruff_cache dist
	find . -name __pycache__ -prune -exec rm -rf {} +

# Systems that ship venv without ensurepip (Debian) get pip from the outer one.
$(BIN)/python .venv-lmms/bin/python: %/bin/python:
	$(PYTHON) -m venv $* || { $(PYTHON) -m venv --clear --without-pip $* && \
		$(PYTHON) -m pip --python $@ install --quiet pip; }

.venv/demo: pyproject.toml constraints.txt | $(BIN)/python
	@echo "installing foveate[demo] into .venv (once; torch is large)"
	$(PIP) -e '.[demo]'
	@touch $@

.venv/dev: pyproject.toml constraints.txt | $(BIN)/python
	@echo "installing foveate[dev] into .venv (once; torch is large)"
	$(PIP) -e '.[dev]'
	@touch $@ .venv/demo

# lmms-eval 0.7.3 pins a wandb that wants an older protobuf. PyPI's torchvision does not load beside
# a CPU build of torch, and transformers breaks on one that does not load.
.venv-lmms/ready: pyproject.toml constraints.txt | .venv-lmms/bin/python
	@echo "installing foveate[lmms] into .venv-lmms (once; minutes)"
	sed '/^protobuf/d' constraints.txt > .venv-lmms/constraints.txt
	.venv-lmms/bin/python -m pip --disable-pip-version-check install --quiet \
		-c .venv-lmms/constraints.txt -e '.[lmms]' pytest
	.venv-lmms/bin/python -c 'import torchvision' 2> /dev/null || \
		.venv-lmms/bin/python -m pip uninstall --quiet --yes torchvision
	@touch $@
