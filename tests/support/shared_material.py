"""Material that lies beside the checkout and is no part of it: real files of others, and small inputs that fail."""

from __future__ import annotations

from pathlib import Path

import pytest

from support.repository import ROOT


def shared_material() -> Path:
    """The folder `../shared`, as seen from the checkout; a test that needs it is skipped where it is not."""
    folder = ROOT.parent / "shared"
    if not folder.is_dir():
        pytest.skip(f"no {folder}: what this test reads is no part of the project")
    return folder
