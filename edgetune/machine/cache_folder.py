"""Where edgetune keeps what it can make again."""

from __future__ import annotations

import os
import stat
import sys
import tempfile
from pathlib import Path

from edgetune.errors import UsageError

CHOSEN = "EDGETUNE_CACHE"
"""Environment variable that names the folder."""


def cache_folder() -> Path:
    """`EDGETUNE_CACHE`, the platform's cache folder of the user, or for one without a home a private temporary folder.

    It need not be there, but for the temporary one, which is made at once so that it cannot be another user's.

    Raises:
        UsageError: There is no home, and the temporary folder cannot be made or is not private.
    """
    if chosen := os.environ.get(CHOSEN):
        return Path(chosen).absolute()
    variable = {"win32": "LOCALAPPDATA", "darwin": ""}.get(sys.platform, "XDG_CACHE_HOME")
    named = Path(os.environ.get(variable, ""))
    # The specification of XDG_CACHE_HOME says that a relative one is to be ignored.
    if named.is_absolute():
        return named / "edgetune"
    home = _home()
    if home is None:
        return _private_folder()
    inner = {"win32": Path("AppData", "Local"), "darwin": Path("Library", "Caches")}.get(sys.platform, Path(".cache"))
    return home / inner / "edgetune"


def _home() -> Path | None:
    """None for a user id without `HOME` and without an entry among the users, as containers have."""
    try:
        home = Path.home()
    except RuntimeError:
        return None
    return home if home.is_absolute() else None


def _private_folder() -> Path:
    """A folder among the temporary ones that nobody else can write: what lies in it is run."""
    user = os.getuid() if hasattr(os, "getuid") else "user"
    fix = f"this user has no home; set HOME, or name a folder of yours in {CHOSEN}"
    try:
        folder = Path(tempfile.gettempdir()) / f"edgetune-{user}"
        folder.mkdir(mode=0o700, exist_ok=True)
        found = folder.lstat()
    except OSError as error:
        raise UsageError(f"no cache folder can be made among the temporary files ({error.strerror}): {fix}") from error
    # On Windows the temporary folder is the user's own, and modes say nothing.
    theirs = sys.platform != "win32" and (found.st_uid != user or found.st_mode & 0o077)
    if theirs or not stat.S_ISDIR(found.st_mode):
        raise UsageError(f"{folder} is not a folder that only this user can open: {fix}")
    return folder
