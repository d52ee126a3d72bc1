"""Memory that a process can still take on this machine, and giving back what it no longer needs."""

from __future__ import annotations

import ctypes
import os
import sys
from pathlib import Path

_MEMINFO = Path("/proc/meminfo")
_LIMIT, _TAKEN = (Path("/sys/fs/cgroup") / name for name in ("memory.max", "memory.current"))
"""Of a container (cgroup v2); what is taken includes file pages that the system would give up."""


def free_memory_bytes() -> int | None:
    """What the system, and the container, can give without swapping; none where nothing tells."""
    found = [size for size in (_available(), _left_of_the_limit()) if size is not None]
    return min(found, default=None)


def _available() -> int | None:
    if _MEMINFO.is_file():
        for line in _MEMINFO.read_text(errors="replace").splitlines():
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) * 1024
    if hasattr(os, "sysconf") and "SC_AVPHYS_PAGES" in os.sysconf_names:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_AVPHYS_PAGES")
    return None


def _left_of_the_limit() -> int | None:
    try:
        limit, taken = (path.read_text().strip() for path in (_LIMIT, _TAKEN))
    except OSError:
        return None
    return None if limit == "max" else max(0, int(limit) - int(taken))


def give_back_freed() -> None:
    """Let the C library give what was freed back to the system; otherwise it keeps most of it for what comes next.

    Worth its milliseconds after much was freed that will not be needed again, such as what compiling a graph took.
    Where the C library has no such call (glibc's is malloc_trim(3)), nothing happens.
    """
    if sys.platform == "linux" and hasattr(library := ctypes.CDLL(None), "malloc_trim"):
        library.malloc_trim(0)
