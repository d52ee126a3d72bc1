"""A folder of rows: `train.jsonl`, `valid.jsonl` and `test.jsonl`, packed or not, named by the folder alone."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from edgetune.data.source import STDIN
from edgetune.errors import UsageError

Split = Literal["train", "valid", "test"]
_ENDS = (".jsonl", ".jsonl.gz")


def rows_file(path: Path, *splits: Split, option: str = "") -> Path:
    """The file that is meant where rows are asked for: the path itself, or a file of the folder that it is.

    Args:
        path: A file, a pipe or a folder.
        splits: Which rows of a folder are meant; the first that it has are taken.
        option: That named the path.

    Raises:
        UsageError: It is a folder that has none of them.
    """
    if path == STDIN or not path.is_dir():
        return path
    if found := _first(path, splits):
        return found
    expected = " or ".join(f"{split}{_ENDS[0]}" for split in splits)
    name = f"{option} {path}".strip()
    raise UsageError(f"{name} is a folder; expected a JSONL file, - for standard input, or a folder with {expected}")


def training_files(data: Path, valid: Path | None) -> tuple[Path, Path | None]:
    """The rows to train on, and those to measure on: a folder's `train` and `valid`, unless others are given.

    Raises:
        UsageError: A folder has no such rows.
    """
    if valid is not None:
        valid = rows_file(valid, "valid", option="--valid")
    elif data != STDIN and data.is_dir():
        valid = _first(data, ("valid",))
    return rows_file(data, "train", option="--data"), valid


def _first(folder: Path, splits: tuple[Split, ...]) -> Path | None:
    names = (folder / f"{split}{end}" for split in splits for end in _ENDS)
    return next((name for name in names if name.exists()), None)
