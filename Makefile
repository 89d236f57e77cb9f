# Each command does everything, set-up included, on a machine with python3 (>= 3.11), make and a C++ compiler:
#     make demo      make test      make install
# All make .venv from the pinned CPU build (constraints.txt) the first time; a second call goes straight to work.
#
# PYTHON=python3.12     the Python that .venv is made with
# ARGS="-k lora -x"     more words for pytest or for the demo
# TORCH_INDEX=URL       where PyTorch's CPU build is fetched when pip does not find it by itself

PYTHON ?= python3
ARGS ?=
TORCH_INDEX ?= https://download.pytorch.org/whl/cpu

VENV := .venv
PY := $(VENV)/bin/python
# -qq: errors only. pip would otherwise print a line for every index it asks. --no-compile: the byte code is made below, by every processor.
PIP := PIP_DISABLE_PIP_VERSION_CHECK=1 $(PY) -m pip install -qq --no-compile -c constraints.txt
# Where PYTHONDONTWRITEBYTECODE is set, each process would else compile torch for itself. A failure is no error: torch has files in a newer Python's syntax.
COMPILE := $(PY) -m compileall -qq -j 0 $(VENV)/lib || true

.DEFAULT_GOAL := help
.PHONY: help demo install test test-slow clean

help:
	@echo 'make demo       debias a tiny BERT in a made-up world, both phases, print the table and write a report'
	@echo 'make install    .venv with the command peftdebias, nothing else'
	@echo 'make test       the tests, without the slow ones   (ARGS="tests/test_lora.py -x" to choose)'
	@echo 'make test-slow  the slow ones'
	@echo 'make clean      remove .venv, runs/demo, builds and caches'

demo: $(VENV)/.package
	$(VENV)/bin/peftdebias demo --out runs/demo $(ARGS)

install: $(VENV)/.package
	@echo 'The command: . $(VENV)/bin/activate, or $(VENV)/bin/peftdebias'

# Byte code is kept even where PYTHONDONTWRITEBYTECODE is set: each of the tests' processes would else compile for itself what it imports.
PYTEST := PYTHONDONTWRITEBYTECODE= $(PY) -m pytest -q

# A process a processor, each with tests of its own.
SIDE_BY_SIDE := -n logical --maxprocesses 8 --dist worksteal

test: $(VENV)/.test
	$(PYTEST) $(SIDE_BY_SIDE) -m "not slow" $(ARGS)

test-slow: $(VENV)/.test
	$(PYTEST) $(SIDE_BY_SIDE) -o faulthandler_timeout=3600 -m slow $(ARGS)

# The package, what it needs at run time, and what draws the report. A stamp file is touched last, so an interrupted install is taken up again.
$(VENV)/.package: pyproject.toml constraints.txt $(wildcard csrc/*)
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null || { echo "error: need Python 3.11 or newer, got '$(PYTHON)' ($$($(PYTHON) --version 2>/dev/null || echo not found)); name another: make PYTHON=python3.12" >&2; exit 1; }
	@$(PYTHON) -c 'import venv, ensurepip' 2>/dev/null || { echo "error: '$(PYTHON)' cannot make a virtual environment; on Debian and Ubuntu: apt-get install python3-venv" >&2; exit 1; }
	@echo "Installing peftdebias and PyTorch (CPU build) into $(VENV): about a minute, once ..."
	@$(PY) -m pip --version >/dev/null 2>&1 || $(PYTHON) -m venv --clear $(VENV)
	@$(PIP) torch setuptools 2>/dev/null || { $(PIP) --no-deps --index-url $(TORCH_INDEX) torch && $(PIP) torch setuptools; } || { echo "error: PyTorch's CPU build could not be installed for this Python (looked at $(TORCH_INDEX) too); another place: make TORCH_INDEX=URL" >&2; exit 1; }
	@rm -f peftdebias/_native*.so  # what does not compile is left out: the one of another csrc/ shall not stand in for it
	@$(PIP) --no-build-isolation -e ".[report]"
	@$(COMPILE)
	@touch $@

# Beside it: pytest, and transformers and peft to compare with. By name, since `-e .[test]` would compile csrc/ again.
$(VENV)/.test: $(VENV)/.package
	@echo "Installing the test extra into $(VENV): about half a minute, once ..."
	@$(PY) -c 'import tomllib; print(*tomllib.load(open("pyproject.toml", "rb"))["project"]["optional-dependencies"]["test"], sep="\n")' > $(VENV)/test.txt
	@$(PIP) -r $(VENV)/test.txt
	@touch $@

clean:
	rm -rf $(VENV) runs/demo build dist *.egg-info .pytest_cache peftdebias/_native*.so
	find peftdebias kernels recipes bench tests -name __pycache__ -type d -prune -exec rm -rf {} +
