"""Bundles that take seconds to make, each made once a test run, however many workers share it."""

from __future__ import annotations

import os
from functools import cache

import pytest
from filelock import FileLock
from prepared_bundles import Prepared, prepare_standard

from edgetune.bundle import Bundle, open_bundle
from edgetune.config import Base


@pytest.fixture(scope="session")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Prepared:
    """`prepared(variant, base)` is the whole bundle of a tiny variant; tests must not change it."""
    root = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        root = root.parent

    @cache
    def bundle(variant: str, base: Base) -> Bundle:
        folder = root / f"{variant}-{base}"
        with FileLock(f"{folder}.lock"):
            return open_bundle(folder) if folder.exists() else prepare_standard(variant, base, folder)

    return bundle
