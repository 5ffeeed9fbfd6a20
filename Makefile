# Verbs: demo test check storm bench gpu clean. `make demo` and `make test` install what they need into .venv first.
PYTHON ?= python3
VENV ?= .venv
TORCH ?= torch==2.13.0
SEEDS ?= 5000
BENCH ?= all

RUN := $(VENV)/bin/python
STAMP := $(VENV)/.installed
# The ranks share the cores of this machine.
export OMP_NUM_THREADS ?= 1

.PHONY: demo test check storm bench gpu install clean
.DEFAULT_GOAL := demo

demo: install
	$(RUN) -m megatron_flashrecovery demo

test: install
	$(RUN) -m pytest -m "not jobs and not gpu and not slow" --durations=20 --numprocesses=logical --maxprocesses=8
	$(RUN) -m pytest -m "jobs and not gpu and not slow" --durations=20

check: install
	$(RUN) -m ruff format --check .
	$(RUN) -m ruff check .
	$(RUN) -m mypy
	$(VENV)/bin/lint-imports
	$(VENV)/bin/codespell

storm: install
	$(RUN) -m tests.simulation.storm --seeds $(SEEDS)
	$(RUN) -m pytest -m "slow and not gpu" --timeout=7200 || [ $$? -eq 5 ] # 5: there is none

bench: install
	$(RUN) -m bench $(BENCH)
	$(RUN) -m bench.readme

gpu: install
	$(RUN) -m pytest -m gpu --durations=20
	$(RUN) -m bench gpu
	$(RUN) -m bench.readme

install: $(STAMP)

# Torch goes first, so that nothing else chooses its version. The CPU build where there is one: set PIP_INDEX_URL or
# PIP_EXTRA_INDEX_URL to an index that has it.
$(STAMP): pyproject.toml
	@$(PYTHON) -c 'import sys; sys.version_info >= (3, 11) or sys.exit("$(PYTHON) is older than 3.11: name a newer one with make PYTHON=...")'
	@$(PYTHON) -c 'import venv, ensurepip' 2>/dev/null || \
	  { echo "$(PYTHON) has no venv module: install it (python3-venv on Debian and Ubuntu)" >&2; exit 2; }
	$(PYTHON) -m venv $(VENV)
	$(RUN) -m pip install --quiet --disable-pip-version-check --upgrade pip
	$(RUN) -m pip install --disable-pip-version-check --progress-bar off "$(TORCH)"
	$(RUN) -m pip install --disable-pip-version-check --progress-bar off -e ".[megatron,diagnose,test]"
	@touch $(STAMP)

clean:
	rm -rf $(VENV) build dist *.egg-info .mypy_cache .ruff_cache .pytest_cache .hypothesis .import_linter_cache
	rm -rf flashrecovery-demo flashrecovery-logs
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
