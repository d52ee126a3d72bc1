"""Runs as people look at them: a page with their curves and settings side by side, and a list of them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from os import PathLike
from pathlib import Path

from edgetune.errors import UsageError
from edgetune.formats.storage import atomic_file, require_unicode
from edgetune.reporting.answers import read_answers
from edgetune.reporting.page import MARK, page_of
from edgetune.reporting.runs import read_run

MOST_RUNS = 8
"""On a page: as many as have a colour of their own."""
_BEGIN = 256
"""Bytes within which the mark of a page stands."""

__all__ = ["MOST_RUNS", "Written", "require_place", "write_report"]


@dataclass(frozen=True)
class Written:
    """A page that was written."""

    path: Path
    bytes: int
    runs: int
    """How many it shows."""


def write_report(
    adapters: Sequence[str | PathLike[str]],
    output: str | PathLike[str],
    *,
    answers: str | PathLike[str] | None = None,
) -> Written:
    """Write one HTML file that shows how adapters were trained; several lie over each other.

    Args:
        adapters: Folders that `train` wrote, or is to write: of a run that is not finished its saved state is shown.
        output: The file; one that such a page was written to is replaced.
        answers: JSONL rows of `prompt`, `before` and `after` to show as well.

    Raises:
        UsageError: No adapter or too many, one without a record, or another file at `output`.
        DataError: The answers are not of that kind.
        LockedError: A run goes on right now.
        VerificationError: A file of an adapter was changed.
        ResourceError: The page would be too large, or the disk has no room for it.
    """
    output = Path(output)
    if not 1 <= len(adapters) <= MOST_RUNS:
        raise UsageError(f"{len(adapters)} adapters were given; a report shows 1 to {MOST_RUNS} of them")
    require_place(output)
    shown = [] if answers is None else read_answers(Path(answers))
    page = page_of([read_run(Path(adapter)) for adapter in adapters], shown)
    with atomic_file(output, replace=True) as file:
        file.write(page)
    return Written(output, len(page), len(adapters))


def require_place(output: Path) -> None:
    """Refuse to write a page over what is none, or where no file can be.

    Raises:
        UsageError: `output` is a folder or another file, lies in no folder, or is not valid Unicode.
    """
    require_unicode(output)
    if output.is_dir():
        raise UsageError(f"{output} is a folder; give the name of a file, such as {output / 'report.html'}")
    if not output.parent.is_dir():
        raise UsageError(f"{output}: {output.parent} is no folder; make it first, or choose another output")
    if output.exists() and (not output.is_file() or MARK not in _begin(output)):
        raise UsageError(f"{output} is there and is no report of edgetune, so it stays; choose another output")


def _begin(path: Path) -> bytes:
    try:
        with path.open("rb") as file:
            return file.read(_BEGIN)
    except OSError as error:
        raise UsageError(f"{path}: cannot be read ({error.strerror}); choose another output") from error
