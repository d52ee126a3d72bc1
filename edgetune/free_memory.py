"""Memory that a process can still take on this machine."""

from __future__ import annotations

import os
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
