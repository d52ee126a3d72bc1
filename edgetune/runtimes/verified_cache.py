"""A folder in which a library keeps compiled models under names of its own, verified before the library sees it.

OpenVINO hands whatever lies in its cache folder to the device. So every file's SHA-256 is written down when a session
ends, and a file that has another one, or none, is removed when the next session begins; it is compiled again then.
"""

from __future__ import annotations

import json
import os
from contextlib import suppress
from pathlib import Path
from types import TracebackType

from edgetune.storage import sha256_of, write_file

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

    def __enter__(self) -> Path | None:
        """The folder; none where nothing can be written."""
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
            self._verify()
            self._drop_old()
        except OSError:
            return None
        return self._folder

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Write down what is there now."""
        with suppress(OSError):
            sums = {path.name: sha256_of(path) for path in self._files()}
            scratch = self._folder / f".{_SUMS}.{os.getpid()}"
            write_file(scratch, json.dumps(sums, indent=1).encode())
            os.replace(scratch, self._folder / _SUMS)

    def _verify(self) -> None:
        try:
            sums = json.loads((self._folder / _SUMS).read_bytes())
        except (OSError, ValueError, RecursionError):
            sums = None
        for path in self._folder.iterdir():
            known = isinstance(sums, dict) and path.name in sums
            if path.name == _SUMS:
                continue
            if not known or path.is_symlink() or not path.is_file() or sha256_of(path) != sums[path.name]:
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
