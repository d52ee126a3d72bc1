"""JSON files, of one object mostly: whatever else they hold is a `VerificationError`, never a surprise."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from edgetune.errors import VerificationError
from edgetune.formats.git_lfs import refuse_pointers

LARGEST = 16 << 20
"""Bytes; the largest that models come with, of their tokenizers, have a few million."""


def read_object(path: Path, fix: str) -> dict[str, Any]:
    """Read a JSON object.

    Args:
        path: The file; nobody needs to have verified it.
        fix: What messages say to do, such as `copy the bundle again`.

    Raises:
        VerificationError: The file cannot be read, is too large, not UTF-8, no JSON, nested too deeply, has a number of
            thousands of digits, holds something else than an object, or is a Git LFS pointer.
    """
    value = read_json(path, fix)
    if not isinstance(value, dict):
        raise VerificationError(f"{path}: expected a JSON object, found {type(value).__name__}; {fix}")
    return value


def read_json(path: Path, fix: str) -> Any:
    """Read whatever JSON a file holds.

    Args:
        path: The file; nobody needs to have verified it.
        fix: What messages say to do.

    Raises:
        VerificationError: As of `read_object`, but that it may hold something else than an object.
    """
    try:
        with path.open("rb") as file:
            data = file.read(LARGEST + 1)
        if len(data) > LARGEST:
            raise VerificationError(f"{path}: has more than {LARGEST:,} bytes; {fix}")
        return json.loads(data.decode("utf-8"))
    except OSError as error:
        raise VerificationError(f"{path}: cannot be read ({error.strerror}); {fix}") from error
    except (ValueError, RecursionError) as error:
        refuse_pointers([path])
        raise VerificationError(f"{path}: not valid JSON ({error}); {fix}") from error
