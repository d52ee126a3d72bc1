"""The tests of interruptions hold in a background job of a script and under nohup as well."""

from __future__ import annotations

import subprocess
import sys

import pytest

from support.repository import ROOT

IGNORING = """
import signal, sys
import pytest
for name in ("SIGINT", "SIGTERM", "SIGHUP"):
    signal.signal(getattr(signal, name), signal.SIG_IGN)
status = pytest.main(sys.argv[1:])
signal.raise_signal(signal.SIGHUP)
print("outlived its terminal")
sys.exit(status)
"""


@pytest.mark.skipif(sys.platform == "win32", reason="Windows passes no ignored signals on")
def test_interruptions_are_tested_where_signals_are_ignored() -> None:
    tests = ROOT / "tests"
    files = [tests / "cli" / "test_cli.py", tests / "across_rooms" / "test_kill.py"]
    chosen = "signals_clean_up or lost_ends_training or interruption_ends_a_command"
    command = [sys.executable, "-c", IGNORING, "-q", "-p", "no:cacheprovider", *map(str, files), "-k", chosen]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout
    summary, last = done.stdout.splitlines()[-2:]
    assert last == "outlived its terminal"
    assert "8 passed" in summary
    assert "skipped" not in summary
