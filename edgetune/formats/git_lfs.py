"""Pointers of Git LFS: three lines of text that lie where a clone has not fetched the file itself.

A clone without Git LFS, or with `GIT_LFS_SKIP_SMUDGE`, leaves them in the place of weights and tokenizers.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

from edgetune.errors import VerificationError

FETCH = "run `git lfs pull` in that folder, or download it again"
"""What to do about a pointer."""
_POINTER = re.compile(rb"version https://git-lfs\.github\.com/spec/v1\n(?:.*\n)*?size (\d{1,18})\n")
"""Of the specification's first version, the only one there is."""
_LARGEST = 1023
"""Bytes; a larger file is no pointer, the specification says."""


def size_behind(path: Path) -> int | None:
    """Bytes of the file that a pointer stands for; None where `path` is no pointer, or cannot be read."""
    try:
        with path.open("rb") as file:
            found = _POINTER.match(file.read(_LARGEST))
    except OSError:
        return None
    return int(found[1]) if found else None


def refuse_pointers(paths: Sequence[Path]) -> None:
    """Refuse files that were not fetched, all of them at once.

    Raises:
        VerificationError: Naming each pointer, the bytes that are missing, and what to do.
    """
    missing = [(path, size) for path in paths if (size := size_behind(path)) is not None]
    if missing:
        told = [f"{path}: a Git LFS pointer in the place of {size:,} bytes" for path, size in missing]
        raise VerificationError("\n".join([*told, f"the files themselves were not fetched: {FETCH}"]))
