"""How many threads of a command want a processor at the same time, as the kernel says it while the command runs."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from tempfile import TemporaryFile

_EVERY = 0.003
"""Seconds between two looks."""
_MOST = 1 << 16
"""Bytes of output."""


def edgetune_threads(*arguments: object, since: str = "", until: str = "") -> Counter[int]:
    """Run a command to its end.

    Args:
        arguments: Of the command.
        since: A regular expression of what the command prints when it is time to begin with looking.
        until: What it prints when it is time to end; never without it.

    Returns:
        How often so many threads of it, or of the child process that has most, ran or waited for a processor.
    """
    command = [sys.executable, "-m", "edgetune", *map(str, arguments)]
    found: Counter[int] = Counter()
    with TemporaryFile() as output:
        with subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=output, stderr=output) as process:
            while process.poll() is None:
                printed = os.pread(output.fileno(), _MOST, 0).decode(errors="replace")
                if re.search(since, printed) and not (until and re.search(until, printed)):
                    found[max(map(_running, _family(process.pid)), default=0)] += 1
                time.sleep(_EVERY)
        assert process.returncode == 0, os.pread(output.fileno(), _MOST, 0).decode()
    return found


def share_of_several(found: Counter[int]) -> float:
    """In which part of the looks with any thread at all there was more than one."""
    several = sum(count for threads, count in found.items() if threads > 1)
    return several / sum(count for threads, count in found.items() if threads)


def _family(pid: int) -> Iterator[int]:
    yield pid
    for task in _tasks(pid):
        with suppress(OSError):
            for child in (task / "children").read_text().split():
                yield from _family(int(child))


def _running(pid: int) -> int:
    running = 0
    for task in _tasks(pid):
        with suppress(OSError):
            running += (task / "stat").read_text().rpartition(")")[2].split()[0] == "R"
    return running


def _tasks(pid: int) -> list[Path]:
    with suppress(OSError):
        return list(Path(f"/proc/{pid}/task").iterdir())
    return []
