"""Where what a run has learnt goes when its place fails."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path

from edgetune.errors import EdgetuneError
from edgetune.formats.storage import atomic_folder


def save_elsewhere(output: Path, error: EdgetuneError | OSError, write: Callable[[Path], None]) -> EdgetuneError:
    """Save what was learnt among the temporary files, or in the current folder, because `output` cannot be written.

    Args:
        output: Where it was to go.
        error: Why it is not there.
        write: Writes an adapter into the empty folder that it is given.

    Returns:
        `error`, which also says where the adapter is now; or that there is no place for it.
    """
    if isinstance(error, OSError):
        error = EdgetuneError(f"{output}: cannot be written ({error.strerror}); check the disk")
    tried = []
    for place in dict.fromkeys((_temporary(), Path.cwd())):
        try:
            # Nobody else's business, wherever it is.
            private = Path(tempfile.mkdtemp(prefix="edgetune-", dir=place))
        except OSError:
            tried.append(str(place))
            continue
        try:
            with atomic_folder(private / output.name) as partial:
                write(partial)
        except (OSError, EdgetuneError):
            tried.append(str(place))
            shutil.rmtree(private, ignore_errors=True)
        else:
            saved = private / output.name
            return type(error)(f"{error}\nwhat was learnt is in {saved}: move it to where it shall be")
    return type(error)(f"{error}\nwhat was learnt is lost: {' and '.join(tried)} take it neither")


def _temporary() -> Path:
    try:
        return Path(tempfile.gettempdir())
    except OSError:  # no folder for temporary files takes any
        return Path.cwd()
