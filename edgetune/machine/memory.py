"""Memory that a process can still take on this machine, and giving back what it no longer needs."""

from __future__ import annotations

import ctypes
import os
import sys
from pathlib import Path

from edgetune.machine import control_group

_MEMINFO = Path("/proc/meminfo")
_STATM = Path("/proc/self/statm")


def free_memory_bytes() -> int | None:
    """What the system, a container or service, and the limit of the process can give without swapping.

    Returns:
        The least of them; none where nothing tells.
    """
    found = (_available(), control_group.left_bytes(), _left_of_the_address_space())
    return min((size for size in found if size is not None), default=None)


def _available() -> int | None:
    if _MEMINFO.is_file():
        for line in _MEMINFO.read_text(errors="replace").splitlines():
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) * 1024
    if hasattr(os, "sysconf") and "SC_AVPHYS_PAGES" in os.sysconf_names:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_AVPHYS_PAGES")
    return None


def _left_of_the_address_space() -> int | None:
    """What `ulimit -v` leaves, all of which would have to be memory that is used."""
    if sys.platform != "linux":
        return None
    import resource

    limit, _ = resource.getrlimit(resource.RLIMIT_AS)
    if limit == resource.RLIM_INFINITY:
        return None
    return max(0, limit - int(_STATM.read_text().split()[0]) * resource.getpagesize())


def give_back_freed() -> None:
    """Let the C library give what was freed back to the system; otherwise it keeps most of it for what comes next.

    Worth its milliseconds after much was freed that will not be needed again, such as what compiling a graph took.
    Where the C library has no such call (glibc's is malloc_trim(3)), nothing happens.
    """
    if sys.platform == "linux" and hasattr(library := ctypes.CDLL(None), "malloc_trim"):
        library.malloc_trim(0)
