"""Memory that Linux's control groups leave to this process: a container's limit, a service's, or a job's.

Groups nest, and the limit of each holds for all below it. Version 2 has one tree of them under /sys/fs/cgroup, version
1 one for memory in the folder `memory` there, and both may be in use at once. /proc/self/cgroup names the group of the
process in each tree. Within a container the tree may begin at the container's own group, while the name is still the
host's: then only the groups that are there count.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

_GROUPS = Path("/sys/fs/cgroup")
_OF_THIS_PROCESS = Path("/proc/self/cgroup")


@dataclass(frozen=True)
class _Version:
    """Names of the files of a group."""

    limits: tuple[str, ...]
    taken: str
    idle: str
    """Key in `memory.stat` of file pages, of the group and those below it, that the system gives up first."""


_V1 = _Version(("memory.limit_in_bytes",), "memory.usage_in_bytes", "total_inactive_file")
# Above memory.high a group is not ended but slowed down to a crawl.
_V2 = _Version(("memory.max", "memory.high"), "memory.current", "inactive_file")


def left_bytes() -> int | None:
    """What the tightest of the groups that this process is in leaves it; none where none of them has a limit.

    File pages that nobody used lately count as free: the system gives them up before it refuses anything.
    """
    left = [_left(group, version) for root, name, version in _trees() for group in _upward(root, name)]
    return min((size for size in left if size is not None), default=None)


def _trees() -> Iterator[tuple[Path, str, _Version]]:
    """The root of each tree, and the name of this process's group in it."""
    named = dict.fromkeys(("", "memory"), "/")
    for line in (_read(_OF_THIS_PROCESS) or "").splitlines():
        _, _, rest = line.partition(":")
        controllers, _, name = rest.partition(":")
        named.update(dict.fromkeys(controllers.split(","), name))
    yield _GROUPS, named[""], _V2
    yield _GROUPS / "memory", named["memory"], _V1


def _upward(root: Path, name: str) -> Iterator[Path]:
    """A group and all above it that are there; no name leads out of the tree."""
    parts = PurePosixPath(name.lstrip("/")).parts
    if ".." in parts:
        parts = ()
    for length in range(len(parts), -1, -1):
        if (group := root.joinpath(*parts[:length])).is_dir():
            yield group


def _left(group: Path, version: _Version) -> int | None:
    limits = [size for name in version.limits if (size := _size(_read(group / name))) is not None]
    taken = _size(_read(group / version.taken))
    if not limits or taken is None:
        return None
    return max(0, min(limits) - max(0, taken - _idle(group, version)))


def _idle(group: Path, version: _Version) -> int:
    lines = (line.split() for line in (_read(group / "memory.stat") or "").splitlines())
    return next((_size(line[1]) or 0 for line in lines if len(line) == 2 and line[0] == version.idle), 0)


def _size(text: str | None) -> int | None:
    """Bytes; none for `max`, which is no limit, and where nothing tells."""
    return int(text) if text is not None and (text := text.strip()).isascii() and text.isdigit() else None


def _read(path: Path) -> str | None:
    try:
        return path.read_text(errors="replace")
    except OSError:
        return None
