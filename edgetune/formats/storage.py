"""Writing so that a folder is either wholly there or not there, and locking it meanwhile.

Beside an output `NAME`, in its parent, lie while it is written:

    .NAME.lock        held by the writer, whose PID is in it
    .NAME.partial-*   what is being built, or being thrown away; no one reads it, the next writer removes it
    .NAME.previous    the folder that is being replaced

No system that edgetune runs on renames a folder over another one, so replacing takes two renames: NAME to
.NAME.previous, the new folder to NAME. A process that dies between the two leaves no NAME; whoever comes next, reader
or writer, puts .NAME.previous back (`recover`). So a replacement leaves the old folder or the new one, at any moment.
"""

from __future__ import annotations

import errno
import glob
import hashlib
import os
import secrets
import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO

from filelock import FileLock, Timeout

from edgetune.errors import EdgetuneError, LockedError, NoRoomError, UsageError
from edgetune.machine.disk import no_room, require_room
from edgetune.machine.exhaustion import lack_behind

CHUNK = 1 << 20
_UNWRITABLE = (
    errno.EROFS, errno.EACCES, errno.EPERM, errno.ENOTDIR, errno.EEXIST, errno.ENOTEMPTY, errno.ENAMETOOLONG,
    errno.ELOOP,
)  # fmt: skip


def sha256_of(path: Path) -> str:
    """SHA-256 of a file's bytes, read in pieces of 1 MiB."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while piece := file.read(CHUNK):
            digest.update(piece)
    return digest.hexdigest()


def write_file(path: Path, data: bytes) -> None:
    """Write `data` and flush it to the disk. The folder it lies in makes it visible at once or not at all."""
    with write_in_place(path) as file:
        file.write(data)
        file.truncate()
        file.flush()
        os.fsync(file.fileno())


def write_in_place(path: Path) -> IO[bytes]:
    """Open a file to be written from its beginning, keeping the room that it has (`room.reserve`)."""
    return path.open("r+b" if path.exists() else "wb")


@contextmanager
def locked(path: Path) -> Iterator[None]:
    """Hold the lock of an output folder.

    Raises:
        LockedError: Another process holds it; the message names its PID.
        OSError: No file can be made there.
    """
    lock_path = _beside(_real(path), "lock")
    lock = FileLock(lock_path)
    # Where no file can be made, as in /proc, filelock would say that another process holds the lock.
    lock_path.touch()
    try:
        lock.acquire(timeout=0)
    except Timeout:
        raise LockedError(f"{path}: locked by PID {_holder(lock_path)}; wait for it or end it") from None
    try:
        # Windows lets no one write, read or remove a file that is locked; there the PID stays unknown.
        with suppress(PermissionError):
            lock_path.write_text(f"{os.getpid()}\n")
        yield
    finally:
        with suppress(PermissionError):
            lock_path.unlink(missing_ok=True)
        lock.release()


@contextmanager
def atomic_folder(path: Path, *, replace: bool = False, marker: str = "", needed: int = 0) -> Iterator[Path]:
    """Build a folder under a temporary name beside `path`; rename it to `path` when the block ends well.

    A killed process leaves only hidden folders, which the next writer of the same folder removes.

    Args:
        path: The folder that shall appear; where it is a link, the folder that the link leads to.
        replace: Put it in the place of a folder that is already there.
        marker: Replace only a folder that holds this file, or nothing.
        needed: Bytes of room that it takes at least, where they are known: fewer free ones are refused at once.

    Yields:
        The temporary folder to fill.

    Raises:
        UsageError: `path` exists and is not to be replaced, cannot be written, or is not valid Unicode.
        LockedError: Another process writes it.
        NoRoomError: The disk has less room than is needed, or a file is larger than it takes.
        EdgetuneError: The disk fails.
    """
    require_unicode(path)
    path = _real(path)
    partial = _beside(path, f"partial-{secrets.token_hex(4)}")
    written = 0
    try:
        _refuse_to_overwrite(path, replace, marker)
        require_room(path, needed)
        path.parent.mkdir(parents=True, exist_ok=True)
        with locked(path):
            _settle(path)
            _refuse_to_overwrite(path, replace, marker)
            partial.mkdir()
            try:
                yield partial
                _sync_tree(partial)
                _put_in_place(partial, path, replace=replace)
            except Exception:
                written = _size(partial)
                raise
            finally:
                _settle(path)
    except NoRoomError:
        raise
    except Exception as error:
        explained = _explained(error, path, written, needed)
        if explained is None:
            raise
        raise explained from error


@contextmanager
def atomic_file(path: Path, *, replace: bool = False) -> Iterator[IO[bytes]]:
    """Write a file under a temporary name beside `path`; rename it to `path` when the block ends well.

    Args:
        path: The file that shall appear; where it is a link, the file that the link leads to.
        replace: Put it in the place of a file that is already there.

    Yields:
        The file to write, at its beginning.

    Raises:
        UsageError: `path` exists and is not to be replaced, is a folder, cannot be written, or is not valid Unicode.
        LockedError: Another process writes it.
        NoRoomError: The disk has less room than is needed.
        EdgetuneError: The disk fails.
    """
    require_unicode(path)
    path = _real(path)
    partial = _beside(path, f"partial-{secrets.token_hex(4)}")
    written = 0
    try:
        if path.is_dir():
            raise UsageError(f"{path} is a folder; give the path of the file to write")
        if path.exists() and not replace:
            raise UsageError(f"{path} already exists; choose another output or add --force to replace it")
        path.parent.mkdir(parents=True, exist_ok=True)
        with locked(path):
            for stale in _partial_beside(path):
                stale.unlink(missing_ok=True)
            try:
                with partial.open("wb") as file:
                    yield file
                    file.flush()
                    written = file.tell()
                    os.fsync(file.fileno())
                os.replace(partial, path)
                sync_folder(path.parent)
            finally:
                partial.unlink(missing_ok=True)
    except Exception as error:
        explained = _explained(error, path, written, 0)
        if explained is None:
            raise
        raise explained from error


def refuse_existing(path: Path) -> None:
    """Refuse a path at which something is, or that is not valid Unicode.

    Raises:
        UsageError: That is so.
    """
    require_unicode(path)
    if path.exists():
        raise UsageError(f"{path} already exists; choose another name or remove it")


def require_unicode(path: Path) -> None:
    """Refuse a path that cannot be written down: tokenizers, ONNX Runtime and manifests take text, not bytes.

    Raises:
        UsageError: It is not valid Unicode, or leads to such a place.
    """
    try:
        os.fsencode(_real(path)).decode("utf-8")
    except UnicodeDecodeError:
        kind = "file" if path.is_file() else "folder"
        raise UsageError(f"{str(path)!a}: the {kind}'s path is not valid Unicode; rename it") from None


def recover(path: Path) -> None:
    """Put back a folder whose replacement was cut off between its two renames; every reader calls this first.

    Raises:
        UsageError: The path is not valid Unicode.
        LockedError: The replacement goes on right now.
    """
    require_unicode(path)
    path = _real(path)
    if _beside(path, "previous").exists() and not path.exists():
        with locked(path):
            _settle(path)


def _real(path: Path) -> Path:
    return Path(os.path.realpath(path))  # unlike Path.resolve, it lets a circle of links pass, which mkdir then refuses


def _beside(path: Path, suffix: str) -> Path:
    return path.parent / f".{path.name}.{suffix}"


def _holder(lock_path: Path) -> str:
    try:
        return lock_path.read_text(errors="replace").strip() or "unknown"
    except OSError:
        return "unknown"


def _refuse_to_overwrite(path: Path, replace: bool, marker: str) -> None:
    if not path.exists():
        return
    if not replace:
        raise UsageError(f"{path} already exists; choose another output or add --force to replace it")
    if not path.is_dir():
        raise UsageError(f"{path} is a file, so no folder replaces it; choose another output")
    if marker and not (path / marker).exists() and any(path.iterdir()):
        raise UsageError(f"{path} holds something else (no {marker}), so it is not replaced; choose another output")


def _put_in_place(partial: Path, path: Path, *, replace: bool) -> None:
    if replace and path.exists():
        os.rename(path, _beside(path, "previous"))
    os.rename(partial, path)
    sync_folder(path.parent)


def _settle(path: Path) -> None:
    """Leave `path` and nothing beside it: the old folder comes back unless the new one is in its place."""
    previous = _beside(path, "previous")
    if previous.exists():
        # Removing takes many steps; renamed first, what is left of it can never be taken for the folder.
        os.rename(previous, _beside(path, f"partial-{secrets.token_hex(4)}") if path.exists() else path)
        sync_folder(path.parent)
    for stale in _partial_beside(path):
        shutil.rmtree(stale, ignore_errors=True)


def _partial_beside(path: Path) -> Iterator[Path]:
    """What earlier writers left; the holder of the lock may remove it."""
    return path.parent.glob(glob.escape(_beside(path, "partial-").name) + "*")


def sync_folder(folder: Path) -> None:
    """Flush the names in a folder to the disk: what was renamed or removed in it stays so."""
    _sync(folder)


def _sync_tree(folder: Path) -> None:
    for path in sorted(folder.rglob("*")):
        if not path.is_symlink():
            _sync(path)
    _sync(folder)


def _sync(path: Path) -> None:
    if sys.platform == "win32" and path.is_dir():
        return  # folders cannot be opened there; NTFS journals their entries
    handle = os.open(path, os.O_RDWR if sys.platform == "win32" else os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _size(folder: Path) -> int:
    return sum(path.lstat().st_size for path in folder.rglob("*") if path.is_file())


def _explained(error: Exception, path: Path, written: int, needed: int) -> EdgetuneError | None:
    """What a failed write means; None where the error is about something else."""
    about = Path(os.fsdecode(error.filename)) if isinstance(error, OSError) and error.filename is not None else None
    elsewhere = about not in (None, path, *path.parents) and not str(about).startswith(str(_beside(path, "")))
    if lack_behind(error) == "room":
        short = no_room(about, 0, error) if about and elsewhere else no_room(path, needed, error, written=written)
        # What a child process or a library said, such as which of its steps it was.
        return short if isinstance(error, OSError) else NoRoomError(f"{error}\n{short}")
    if elsewhere or not isinstance(error, OSError):
        return None
    # Some file systems, as that of /proc, say so where nothing can be made.
    no_place = error.errno == errno.ENOENT and about is not None and about.parent in path.parents
    if no_place or error.errno in _UNWRITABLE:
        return UsageError(f"{path}: cannot be written ({error.strerror}); choose another output")
    if error.errno == errno.EIO:
        return EdgetuneError(f"{path}: cannot be written ({error.strerror}); check the disk")
    return None
