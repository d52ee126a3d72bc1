"""These tests run where edgetune was installed without extras: `make test-device`. Elsewhere they are not collected."""

from __future__ import annotations

import json
from importlib.util import find_spec
from typing import Any

import pytest

from support.golden import BUNDLE, GOLDEN
from support.golden_run import Trained, train_golden

collect_ignore_glob = ["test_*.py"] if find_spec("torch") else []


@pytest.fixture(scope="session")
def expected() -> dict[str, Any]:
    """What PyTorch and PEFT gave."""
    values: dict[str, Any] = json.loads((GOLDEN / "expected.json").read_text(encoding="utf-8"))
    return values


@pytest.fixture(scope="session")
def trained(tmp_path_factory: pytest.TempPathFactory, expected: dict[str, Any]) -> Trained:
    """The golden run, once, through `edgetune.training`."""
    return train_golden(BUNDLE, tmp_path_factory.mktemp("trained") / "adapter", expected["options"])
