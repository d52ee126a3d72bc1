"""Copies of bundles that other tests use meanwhile."""

from __future__ import annotations

import shutil
from pathlib import Path

from edgetune.formats.bundle import Bundle, load_bundle
from edgetune.runtimes.verified_cache import CACHE


def copy_of_bundle(bundle: Path, folder: Path) -> Path:
    """What is sealed in the bundle, without the compiled models beside it: those come and go while runs have them."""
    return Path(shutil.copytree(bundle, folder, ignore=shutil.ignore_patterns(CACHE)))


def opened_copy(bundle: Bundle, folder: Path) -> Bundle:
    """Such a copy, opened."""
    return load_bundle(copy_of_bundle(bundle.path, folder))
