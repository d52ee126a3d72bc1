"""What Linux's control groups leave to this process: a container's limits, a service's, or a job's.

Groups nest, and the limits of each hold for all below it. Version 2 has one tree of them under /sys/fs/cgroup, version
1 one for each controller in a folder of its name there, and both may be in use at once. /proc/self/cgroup names the
group of the process in each tree (cgroups(7)). Within a container the tree may begin at the container's own group,
while the name is still the host's: then only the groups that are there count.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

_GROUPS = Path("/sys/fs/cgroup")
_OF_THIS_PROCESS = Path("/proc/self/cgroup")


@dataclass(frozen=True)
class _Memory:
    """Names of a group's files, by the version of the tree."""

    limits: tuple[str, ...]
    taken: str
    idle: str
    """Key in `memory.stat` of file pages, of the group and those below it, that the system gives up first."""


_MEMORY = {
    1: _Memory(("memory.limit_in_bytes",), "memory.usage_in_bytes", "total_inactive_file"),
    # Above memory.high a group is not ended but slowed down to a crawl.
    2: _Memory(("memory.max", "memory.high"), "memory.current", "inactive_file"),
}
_PROCESSORS = {1: ("cpu.cfs_quota_us", "cpu.cfs_period_us"), 2: ("cpu.max",)}


def left_bytes() -> int | None:
    """What the tightest of the groups that this process is in leaves it; none where none of them has a limit.

    File pages that nobody used lately count as free: the system gives them up before it refuses anything.
    """
    left = [_left(group, _MEMORY[version]) for group, version in _groups("memory")]
    return min((size for size in left if size is not None), default=None)


def granted_processors() -> float | None:
    """Processors' worth of time that the tightest group grants; none where none of them has a quota."""
    quotas = [_quota(group, _PROCESSORS[version]) for group, version in _groups("cpu")]
    return min((quota for quota in quotas if quota is not None), default=None)


def _groups(controller: str) -> Iterator[tuple[Path, int]]:
    """The groups that are there of those that this process is in, upwards, and the version of their tree."""
    named = dict.fromkeys(("", controller), "/")
    for line in (_read(_OF_THIS_PROCESS) or "").splitlines():
        _, _, rest = line.partition(":")
        controllers, _, name = rest.partition(":")
        named.update(dict.fromkeys(controllers.split(","), name))
    for root, name, version in ((_GROUPS, named[""], 2), (_GROUPS / controller, named[controller], 1)):
        parts = PurePosixPath(name.lstrip("/")).parts
        # No name leads out of the tree.
        for length in range(0 if ".." in parts else len(parts), -1, -1):
            if (group := root.joinpath(*parts[:length])).is_dir():
                yield group, version


def _left(group: Path, names: _Memory) -> int | None:
    limits = [size for name in names.limits if (size := _size(_read(group / name))) is not None]
    taken = _size(_read(group / names.taken))
    if not limits or taken is None:
        return None
    lines = (line.split() for line in (_read(group / "memory.stat") or "").splitlines())
    idle = next((_size(line[1]) or 0 for line in lines if len(line) == 2 and line[0] == names.idle), 0)
    return max(0, min(limits) - max(0, taken - idle))


def _quota(group: Path, names: tuple[str, ...]) -> float | None:
    words = " ".join(_read(group / name) or "" for name in names).split()
    sizes = [_size(word) for word in words]
    # No limit is `max` in version 2 and -1 in version 1.
    return sizes[0] / sizes[1] if len(sizes) == 2 and sizes[0] and sizes[1] else None


def _size(text: str | None) -> int | None:
    """A number; none for `max` and -1, which are no limit, and where nothing tells."""
    return int(text) if text is not None and (text := text.strip()).isascii() and text.isdigit() else None


def _read(path: Path) -> str | None:
    try:
        return path.read_text(errors="replace")
    except OSError:
        return None
