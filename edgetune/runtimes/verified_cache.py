"""A folder in which a library keeps compiled models under names of its own, verified before the library sees it.

OpenVINO hands whatever lies in its cache folder to the device. So every file's SHA-256 is written down when a session
ends, and a file that has another one, or none, is removed when the next session begins; it is compiled again then. A
session has the folder to itself: what another one compiles meanwhile has no SHA-256 yet.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Mapping
from contextlib import ExitStack, suppress
from pathlib import Path
from types import TracebackType

from edgetune.errors import LockedError, VerificationError
from edgetune.formats.json_file import read_object
from edgetune.formats.storage import locked, sha256_of, write_file

CACHE = ".cache"
"""Folder in a bundle for compiled models. It is not part of the bundle, and can be deleted at any time."""
_SUMS = "sha256.json"
MOST_BYTES = 64 << 20
"""Of files that are kept, the youngest ones."""


class VerifiedFolder:
    """Holds nothing but what an earlier session left.

    Args:
        folder: Is made where it is missing.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._held: ExitStack | None = None
        """The lock, once the folder was verified."""

    def __enter__(self) -> Path | None:
        """The folder; none where nothing can be written, or while another session has it."""
        try:
            with ExitStack() as held:
                if self._folder.is_symlink():
                    # What lies where it leads is not ours to remove.
                    self._folder.unlink()
                self._folder.mkdir(parents=True, exist_ok=True)
                held.enter_context(locked(self._folder))
                self._verify()
                self._drop_old()
                self._held = held.pop_all()
        except (OSError, LockedError):
            return None
        return self._folder

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Write down what is there now; only what was verified at first can be vouched for."""
        if self._held is None:
            return
        with suppress(OSError), self._held:
            sums = {path.name: sha256_of(path) for path in self._files()}
            scratch = self._folder / f".{_SUMS}"
            write_file(scratch, json.dumps(sums, indent=1).encode())
            os.replace(scratch, self._folder / _SUMS)

    def _verify(self) -> None:
        try:
            known = read_object(self._folder / _SUMS, "it is made anew")
        except VerificationError:
            known = {}
        for path in self._folder.iterdir():
            if path.is_dir() and not path.is_symlink():
                shutil.rmtree(path)
            elif path.is_symlink() or not path.is_file() or not _is_known(path, known):
                path.unlink()

    def _drop_old(self) -> None:
        files = sorted(((path, path.stat()) for path in self._files()), key=lambda each: -each[1].st_mtime)
        total = 0
        for path, status in files:
            total += status.st_size
            if total > MOST_BYTES:
                path.unlink()

    def _files(self) -> list[Path]:
        return [path for path in self._folder.iterdir() if path.is_file() and not path.name.startswith((_SUMS, "."))]


def _is_known(path: Path, sums: Mapping[str, object]) -> bool:
    return path.name == _SUMS or (path.name in sums and sha256_of(path) == sums[path.name])
