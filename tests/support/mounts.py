"""Mounts that only one process and its children see."""

from __future__ import annotations

import shutil
import subprocess
import sys
from functools import cache

import pytest


@cache
def _can_mount() -> bool:
    if sys.platform != "linux" or shutil.which("unshare") is None:
        return False
    tried = ["unshare", "-m", "mount", "-t", "tmpfs", "none", "/mnt"]
    return subprocess.run(tried, capture_output=True).returncode == 0


needs_mounts = pytest.mark.skipif(not _can_mount(), reason="only root on Linux may mount in a namespace of its own")
