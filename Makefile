# make setup   .venv with everything (host and device), and the side environment with ONNX Runtime Training
# make test    setup, then every check and test; the device tests in .venv-device, without the host extras
# make demo    setup, then the main job on a small model that is built on the spot
# make lint    setup, then ruff and mypy alone
# make bench   setup, then edgetune and PyTorch + PEFT in one sitting (BENCH="--cases small-best --runs 3"; docs/benchmarks.md)

# The versions in requirements/host.txt were verified on CPython 3.11; 3.12 and 3.13 need one beside them for the
# side environment.
PYTHON ?= $(firstword $(shell for p in python3.11 python3; do $$p -c '' 2>/dev/null && echo $$p; done) python3)
PIP_INSTALL = -m pip install --quiet --disable-pip-version-check
HOST = .venv/bin/python
DEVICE = .venv-device/bin/python
SOURCES = $(shell find edgetune devices -type f -not -name '*.pyc')

.DEFAULT_GOAL = help
.PHONY: help setup lint test test-device test-host demo bench

help:
	@sed -n 's/^# make/make/p' Makefile

setup: .venv/installed
	$(HOST) -c 'from edgetune.side_environment import ensure_side_environment as ensure; ensure(print)'

lint: setup
	.venv/bin/ruff check .
	.venv/bin/mypy

test: lint test-device test-host

test-device: .venv-device/installed
	.venv-device/bin/pytest --confcutdir tests/device tests/device

test-host: setup
	.venv/bin/pytest -n 2

demo: setup
	$(HOST) examples/demo.py

bench: setup
	$(HOST) -m benchmarks $(BENCH)

.venv/installed: pyproject.toml requirements/host.txt
	$(PYTHON) -m venv .venv
	$(HOST) $(PIP_INSTALL) --constraint requirements/host.txt --editable '.[host,openvino,test]'
	touch $@

# First what a device gets, in the verified versions; pytest comes on top and is not counted.
.venv-device/requirements-installed: pyproject.toml requirements/device.txt
	$(PYTHON) -m venv .venv-device
	$(DEVICE) $(PIP_INSTALL) --constraint requirements/device.txt .
	$(DEVICE) $(PIP_INSTALL) --constraint requirements/host.txt pytest
	touch $@

.venv-device/installed: .venv-device/requirements-installed $(SOURCES)
	$(DEVICE) $(PIP_INSTALL) --no-deps --force-reinstall .
	touch $@
