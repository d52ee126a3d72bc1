"""Bundles that take seconds to make, each made once a test run, however many workers share it; default signals."""

from __future__ import annotations

import os
from collections.abc import Callable
from functools import cache
from pathlib import Path

import pytest
from filelock import FileLock

from edgetune.config import Base
from edgetune.formats.bundle import Bundle, load_bundle
from support.default_signals import take_ignored_signals
from support.prepared_bundles import InPieces, Prepared, prepare_dora, prepare_in_pieces, prepare_standard


def pytest_configure(config: pytest.Config) -> None:
    """Before any test, in the processes that run them; the one that only starts those passes on what it was given."""
    if not config.getoption("numprocesses", default=None):
        take_ignored_signals()


@pytest.fixture(scope="session")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Prepared:
    """`prepared(variant, base)` is the whole bundle of a tiny variant; tests must not change it."""
    root = _shared_folder(tmp_path_factory)

    @cache
    def bundle(variant: str, base: Base) -> Bundle:
        return _once(root / f"{variant}-{base}", lambda folder: prepare_standard(variant, base, folder))

    return bundle


@pytest.fixture(scope="session")
def in_pieces(tmp_path_factory: pytest.TempPathFactory) -> InPieces:
    """`in_pieces(variant)` is a bundle whose sublayers are cut; tests must not change it."""
    root = _shared_folder(tmp_path_factory)

    @cache
    def bundle(variant: str) -> Bundle:
        return _once(root / f"{variant}-in-pieces", lambda folder: prepare_in_pieces(variant, folder))

    return bundle


@pytest.fixture(scope="session")
def with_dora(tmp_path_factory: pytest.TempPathFactory) -> Prepared:
    """`with_dora(variant, base)` is the bundle of a tiny variant with magnitudes; tests must not change it."""
    root = _shared_folder(tmp_path_factory)

    @cache
    def bundle(variant: str, base: Base) -> Bundle:
        return _once(root / f"{variant}-{base}-dora", lambda folder: prepare_dora(variant, base, folder))

    return bundle


def _shared_folder(factory: pytest.TempPathFactory) -> Path:
    """One for all worker processes."""
    folder = factory.getbasetemp()
    return folder.parent if "PYTEST_XDIST_WORKER" in os.environ else folder


def _once(folder: Path, make: Callable[[Path], Bundle]) -> Bundle:
    """What one of the worker processes made in a folder."""
    with FileLock(f"{folder}.lock"):
        return load_bundle(folder) if folder.exists() else make(folder)
