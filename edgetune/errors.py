"""Every error a person can meet, grouped by who must act. Only `edgetune/cli` turns them into exit codes.

Messages name the value, what was expected, and the fix.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar


class EdgetuneError(Exception):
    """Something failed that nobody foresaw a fix for. Every other error of edgetune is one as well."""


class UsageError(EdgetuneError):
    """What was asked for cannot be meant or is not there: an option, two options together, a path."""


class DataError(EdgetuneError):
    """The rows are wrong.

    Args:
        problems: One `file:line: reason` each; the first 20 are shown, the rest are counted.
    """

    shown: ClassVar[int] = 20

    def __init__(self, problems: Sequence[str]) -> None:
        self.problems = list(problems)
        lines = self.problems[: self.shown]
        hidden = len(self.problems) - len(lines)
        if hidden:
            lines.append(f"… and {hidden} more")
        super().__init__("\n".join(lines))


class IncompatibleError(EdgetuneError):
    """Two things do not fit together, or a model is of a family that is not supported."""


class TemplateStoppedError(IncompatibleError):
    """A chat template took too much time or memory and was stopped: the next conversation would be no better."""


class VerificationError(EdgetuneError):
    """A file is not what its manifest says, or could do harm."""


class ResourceError(EdgetuneError):
    """Not enough memory, disk or time, or more than a device takes."""


class NoRoomError(ResourceError):
    """A disk has less room than is needed; the message says how much is needed and how much is free."""


class InterruptedRunError(EdgetuneError):
    """A signal ended a run between two steps; the message says how it goes on."""


class PausedRunError(EdgetuneError):
    """A run ended between two steps because that was asked for; the message says how it goes on."""


class LockedError(EdgetuneError):
    """Another process works on the same folder."""


class MissingDependencyError(EdgetuneError):
    """A package or tool is not installed; the message says how to get it."""
