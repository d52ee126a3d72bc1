"""Commands run by a user that nobody is."""

from __future__ import annotations

import shutil
import subprocess
import sys
from functools import cache

import pytest

USER = 12345
"""Without an entry among the users."""
# Reads what root reads, which is where Python may lie, and writes nothing of root's.
AS_USER = ["setpriv", f"--reuid={USER}", f"--regid={USER}", "--clear-groups"]
AS_USER += ["--inh-caps=+dac_read_search", "--ambient-caps=+dac_read_search"]


@cache
def _can_be_another_user() -> bool:
    if sys.platform != "linux" or shutil.which("setpriv") is None:
        return False
    return subprocess.run([*AS_USER, sys.executable, "-c", ""], capture_output=True).returncode == 0


needs_another_user = pytest.mark.skipif(not _can_be_another_user(), reason="only root on Linux may become another user")
