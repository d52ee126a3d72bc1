"""Memory of a process and all that it starts, watched from outside (Linux)."""

from __future__ import annotations

from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from threading import Event, Thread
from types import TracebackType

PROC = Path("/proc")
INTERVAL = 0.02
"""Seconds between two looks."""


@dataclass(frozen=True)
class Status:
    """Resident memory of one process, in bytes, as /proc/PID/status tells it."""

    high_water: int
    """VmHWM: the most that was ever resident."""
    anonymous: int
    """RssAnon: what the process allocated."""
    file: int
    """RssFile: pages of mapped files, which the system can drop and read again."""
    shared: int
    """RssShmem."""


@dataclass(frozen=True)
class PeakMemory:
    """Peaks in bytes. Of several processes they are added up."""

    resident: int
    """VmHWM of each process: exact for one, an upper bound for several, whose peaks need not coincide."""
    largest: int
    """VmHWM of the largest process."""
    anonymous: int
    """Highest sum of RssAnon and RssShmem that was seen at one time."""
    file: int
    """Highest sum of RssFile that was seen at one time."""


def read_status(pid: int, proc: Path = PROC) -> Status | None:
    """Resident memory of a process; none when it is gone or about to be."""
    try:
        lines = (proc / str(pid) / "status").read_text().splitlines()
    except OSError:
        return None
    fields = dict(line.split(":", 1) for line in lines if ":" in line)
    names = ("VmHWM", "RssAnon", "RssFile", "RssShmem")
    if not all(name in fields for name in names):
        return None
    return Status(*(int(fields[name].split()[0]) * 1024 for name in names))


def process_tree(pid: int, proc: Path = PROC) -> list[int]:
    """A process and its descendants, itself first."""
    tree = [pid]
    for member in tree:
        # The list grows while it is walked.
        with suppress(OSError):  # the process ends while it is looked at
            for children in (proc / str(member) / "task").glob("*/children"):
                with suppress(OSError):  # or a thread of it
                    tree += [int(child) for child in children.read_text().split()]
    return tree


class MemoryWatch:
    """Looks at a process tree again and again, in a thread, until the block is left.

    Args:
        pid: The root of the tree.
    """

    def __init__(self, pid: int) -> None:
        self._pid = pid
        self._seen: set[int] = set()
        self._high_water: dict[int, int] = {}
        self._anonymous = self._file = 0
        self._stop = Event()
        self._thread = Thread(target=self._watch, daemon=True)

    def __enter__(self) -> MemoryWatch:
        """Begin."""
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """End."""
        self._stop.set()
        self._thread.join()

    def peak(self) -> PeakMemory:
        """The peaks so far."""
        marks = self._high_water.values()
        return PeakMemory(sum(marks), max(marks, default=0), self._anonymous, self._file)

    def _watch(self) -> None:
        while not self._stop.wait(INTERVAL):
            self._look()

    def _look(self) -> None:
        tree = process_tree(self._pid)
        # Between fork and exec a child shows its parent's memory: it counts from the second look on.
        known = [pid for pid in tree if pid in self._seen or pid == self._pid]
        self._seen = set(tree)
        found = {pid: status for pid in known if (status := read_status(pid))}
        # The newest value, not the highest: exec starts a process's mark anew.
        self._high_water |= {pid: status.high_water for pid, status in found.items()}
        self._anonymous = max(self._anonymous, sum(status.anonymous + status.shared for status in found.values()))
        self._file = max(self._file, sum(status.file for status in found.values()))
