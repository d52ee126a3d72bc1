"""Writing so that a folder is either wholly there or not there, and locking it meanwhile."""

from __future__ import annotations

import errno
import hashlib
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from filelock import FileLock, Timeout

from edgetune.errors import EdgetuneError, LockedError, ResourceError, UsageError

CHUNK = 1 << 20


def sha256_of(path: Path) -> str:
    """SHA-256 of a file's bytes, read in pieces of 1 MiB."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while piece := file.read(CHUNK):
            digest.update(piece)
    return digest.hexdigest()


def write_file(path: Path, data: bytes) -> None:
    """Write `data` and flush it to the disk. The folder it lies in makes it visible at once or not at all."""
    with path.open("wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _sync_tree(folder: Path) -> None:
    for path in sorted(folder.rglob("*")):
        _sync(path)
    _sync(folder)


@contextmanager
def locked(path: Path) -> Iterator[None]:
    """Hold the lock of an output folder.

    Raises:
        LockedError: Another process holds it; the message names its PID.
    """
    lock_path = path.parent / f".{path.name}.lock"
    lock = FileLock(lock_path)
    try:
        lock.acquire(timeout=0)
    except Timeout:
        holder = lock_path.read_text(errors="replace").strip() or "unknown"
        raise LockedError(f"{path}: locked by PID {holder}; wait for it or end it") from None
    try:
        lock_path.write_text(f"{os.getpid()}\n")
        yield
    finally:
        lock_path.unlink(missing_ok=True)
        lock.release()


@contextmanager
def atomic_folder(path: Path, *, replace: bool = False) -> Iterator[Path]:
    """Build a folder under a temporary name beside `path`; rename it to `path` when the block ends well.

    A killed process leaves only a hidden `.NAME.partial-*`, which the next writer of the same folder removes.

    Args:
        path: The folder that shall appear.
        replace: Put it in the place of a folder that is already there.

    Yields:
        The temporary folder to fill.

    Raises:
        UsageError: `path` exists and `replace` is off.
        LockedError: Another process writes it.
        ResourceError: The disk is full.
    """
    path = path.absolute()
    if path.exists() and not replace:
        raise UsageError(f"{path} already exists; choose another output or add --force to replace it")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with locked(path):
            for stale in path.parent.glob(f".{path.name}.partial-*"):
                shutil.rmtree(stale, ignore_errors=True)
            partial = Path(tempfile.mkdtemp(prefix=f".{path.name}.partial-", dir=path.parent))
            try:
                partial.chmod(0o755)
                yield partial
                _sync_tree(partial)
                _swap(partial, path)
            finally:
                shutil.rmtree(partial, ignore_errors=True)
    except OSError as error:
        explained = _explained(error, path)
        if explained is None:
            raise
        raise explained from error


def _swap(partial: Path, path: Path) -> None:
    if path.exists():
        old = Path(tempfile.mkdtemp(prefix=f".{path.name}.partial-", dir=path.parent))
        os.rename(path, old / "old")
        os.rename(partial, path)
        shutil.rmtree(old, ignore_errors=True)
    else:
        os.rename(partial, path)
    _sync(path.parent)


def _explained(error: OSError, path: Path) -> EdgetuneError | None:
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        free = shutil.disk_usage(path.parent).free
        return ResourceError(f"{path}: the disk is full ({free:,} bytes free); free some space or choose another output")
    if error.errno in (errno.EROFS, errno.EACCES, errno.EPERM):
        return UsageError(f"{path}: cannot be written ({error.strerror}); choose another output")
    return None
