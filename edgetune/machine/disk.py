"""Room on disks: whether there is enough, and kept for what will be written, so that it cannot run out meanwhile."""

from __future__ import annotations

import errno
import os
import shutil
import sys
import tempfile
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path

from edgetune.errors import NoRoomError
from edgetune.machine.exhaustion import lack_behind

_PIECE = 1 << 20
_NOT_OFFERED = (errno.EOPNOTSUPP, errno.EINVAL, errno.ENOSYS)
"""By file systems that allocate nothing ahead."""


def free_bytes(path: Path) -> int:
    """What a user may still write on the disk that `path` lies on, or will lie on."""
    return shutil.disk_usage(next(place for place in (path, *path.parents) if place.exists())).free


def require_room(path: Path, needed: int) -> None:
    """See that there is room for a folder before it is written.

    Args:
        path: Where it will appear.
        needed: Bytes that it takes at least, on the way to being complete.

    Raises:
        NoRoomError: Fewer are free.
    """
    if free_bytes(path) < needed:
        raise no_room(path, needed)


def reserve(folder: Path, sizes: Mapping[str, int], output: Path) -> None:
    """Take the room of files before they are written: `storage.write_in_place` writes them without taking more.

    Args:
        folder: A folder under construction.
        sizes: Bytes of each file, at most.
        output: What the folder will become, for messages.

    Raises:
        NoRoomError: There is less room, or a file system does not take files of such a size.
    """
    needed = sum(sizes.values())
    require_room(output, needed)
    try:
        for name, size in sizes.items():
            _allocate(folder / name, size)
    except OSError as error:
        if lack_behind(error) != "room":
            raise
        raise no_room(output, needed, error) from error


def no_room(path: Path, needed: int, error: BaseException | None = None, *, written: int | None = None) -> NoRoomError:
    """What a lack of room means, in bytes.

    Args:
        path: What was to be written.
        needed: Bytes that it takes at least, where they are known.
        error: What said so.
        written: Bytes that were written before; none where it is not known.
    """
    place = path if path.exists() else next(parent for parent in path.parents if parent.exists())
    number = error.errno if isinstance(error, OSError) else None
    what = {
        errno.EDQUOT: "this user's quota of the disk is used up",
        errno.EFBIG: f"a file is larger than its file system{_limit()} allows",
    }.get(number or 0, "the disk is full")
    wanted = f"{needed:,} bytes are needed, " if needed else ""
    if written is not None and written >= needed:
        wanted = f"more than the {written:,} bytes that were written are needed, "
    free = free_bytes(path)
    # Where there is enough, something else had none.
    elsewhere = _free_elsewhere(place) if free > max(needed, written or 0) else ""
    told = f"{wanted}{free:,} {'' if wanted else 'bytes '}are free now{elsewhere}"
    return NoRoomError(f"{path}: {what}: {told}; free some space or choose another output")


def _allocate(path: Path, size: int) -> None:
    with path.open("xb") as file:
        if hasattr(os, "posix_fallocate"):
            try:
                os.posix_fallocate(file.fileno(), 0, max(1, size))
                return
            except OSError as error:
                if error.errno not in _NOT_OFFERED:
                    raise
        for start in range(0, size, _PIECE):
            file.write(bytes(min(_PIECE, size - start)))
        file.flush()
        # Some systems find out only now.
        os.fsync(file.fileno())


def _limit() -> str:
    if sys.platform == "win32":
        return ""
    import resource

    limit, _ = resource.getrlimit(resource.RLIMIT_FSIZE)
    return "" if limit == resource.RLIM_INFINITY else f", or `ulimit -f` with {limit:,} bytes,"


def _free_elsewhere(place: Path) -> str:
    """Temporary files may be what found no room, where they lie on a disk of their own."""
    with suppress(OSError):
        scratch = Path(tempfile.gettempdir())
        if scratch.stat().st_dev != place.stat().st_dev:
            return f", {free_bytes(scratch):,} in {scratch} for temporary files"
    return ""
