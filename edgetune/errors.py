"""Every error a person can meet, grouped by who must act. Only the CLI turns them into exit codes.

Messages name the value, what was expected, and the fix.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar


class EdgetuneError(Exception):
    """Something failed that nobody foresaw a fix for (exit code 1)."""

    exit_code: ClassVar[int] = 1


class UsageError(EdgetuneError):
    """The command line or the config file asks for something that does not exist (2)."""

    exit_code = 2


class DataError(EdgetuneError):
    """The rows are wrong (3).

    Args:
        problems: One `file:line: reason` each; the first 20 are shown, the rest are counted.
    """

    exit_code = 3
    shown: ClassVar[int] = 20

    def __init__(self, problems: Sequence[str]) -> None:
        self.problems = list(problems)
        lines = self.problems[: self.shown]
        hidden = len(self.problems) - len(lines)
        if hidden:
            lines.append(f"… and {hidden} more")
        super().__init__("\n".join(lines))


class IncompatibleError(EdgetuneError):
    """Two things do not fit together, or a model is of a family that is not supported (4)."""

    exit_code = 4


class TemplateStoppedError(IncompatibleError):
    """A chat template took too much time or memory and was stopped (4): the next conversation would be no better."""


class VerificationError(EdgetuneError):
    """A file is not what its manifest says, or could do harm (5)."""

    exit_code = 5


class ResourceError(EdgetuneError):
    """Not enough memory, disk or time (6)."""

    exit_code = 6


class NoRoomError(ResourceError):
    """A disk has less room than is needed (6); the message says how much is needed and how much is free."""


class LockedError(EdgetuneError):
    """Another process works on the same folder (7)."""

    exit_code = 7


class MissingDependencyError(EdgetuneError):
    """A package or tool is not installed; the message says how to get it (1)."""
