"""Tests start their children as a terminal would, however the tests themselves were started.

A job in the background of a script inherits an ignored SIGINT, and one under nohup an ignored SIGHUP; both pass it on
to every process that they start, which then cannot be interrupted.
"""

from __future__ import annotations

import signal
from types import FrameType


def take_ignored_signals() -> None:
    """Let children start with the default signals: a signal that is handled, and not ignored, is theirs by default.

    The tests' own process goes on ignoring it.
    """
    for name in ("SIGINT", "SIGTERM", "SIGHUP"):
        number = getattr(signal, name, None)  # Windows has no SIGHUP
        if number is not None and signal.getsignal(number) is signal.SIG_IGN:
            signal.signal(number, _ignore)


def _ignore(number: int, frame: FrameType | None) -> None:
    pass
