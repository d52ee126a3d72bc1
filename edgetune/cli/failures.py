"""From an exception to a line for people, an object for programs, and an exit code, which nothing else knows."""

from __future__ import annotations

import errno
import os
import traceback
from contextlib import suppress
from dataclasses import asdict, dataclass, field

import click

from edgetune.cli.output import print_json, printable
from edgetune.errors import DataError, EdgetuneError, MissingDependencyError, ResourceError

INTERRUPTED = 130
DEBUG = "EDGETUNE_DEBUG"
"""Environment variable that shows tracebacks."""
_EXHAUSTED = (errno.ENOSPC, errno.EDQUOT, errno.ENOMEM)

_NO_MEMORY = "error: not enough memory; close other programs, or choose a smaller batch, length or model"
_ALLOCATION_SIGNS = ("Failed to allocate memory", "bad_alloc", "bad allocation")
"""How ONNX Runtime says it, in exceptions of its own."""


@dataclass(frozen=True)
class Failure:
    """What the command line says of an exception."""

    code: int
    """The exit code."""
    message: str
    problems: list[str] = field(default_factory=list)
    """`file:line: reason` of each bad row that is shown."""


def failure_of(error: BaseException) -> Failure:
    """Sort an exception by who must act."""
    match error:
        case DataError():
            return Failure(error.exit_code, f"error: {error}", error.problems[: error.shown])
        case EdgetuneError():
            return Failure(error.exit_code, f"error: {error}")
        case click.UsageError():
            hint = f"\nTry '{error.ctx.command_path} --help'." if error.ctx else ""
            return Failure(error.exit_code, f"error: {error.format_message()}{hint}")
        case click.ClickException():
            return Failure(error.exit_code, f"error: {error.format_message()}")
        case KeyboardInterrupt() | click.Abort():
            return Failure(INTERRUPTED, "error: interrupted")
        case MemoryError():
            return Failure(ResourceError.exit_code, _NO_MEMORY)
        case _ if any(sign in str(error) for sign in _ALLOCATION_SIGNS):
            return Failure(ResourceError.exit_code, _NO_MEMORY)
        case ModuleNotFoundError() if not (error.name or "edgetune").startswith("edgetune"):
            fix = 'pip install "edgetune[host]" brings what prepare and export need; see `edgetune doctor`'
            return Failure(MissingDependencyError.exit_code, f"error: {error.name} is not installed; {fix}")
        case OSError() if error.errno in _EXHAUSTED:
            message = f"error: {_place(error)}{error.strerror}; free some space and try again"
            return Failure(ResourceError.exit_code, message)
        case OSError() if error.filename is not None:
            return Failure(EdgetuneError.exit_code, f"error: {_place(error)}{error.strerror}")
        case _:
            reason = " ".join(f"{type(error).__name__}: {error}".split())
            advice = f"run again with {DEBUG}=1 for the traceback"
            return Failure(EdgetuneError.exit_code, f"internal error: {reason:.400}; {advice}")


def report(error: BaseException, *, as_json: bool) -> int:
    """Say what failed, on stderr and, where JSON was asked for, as one object on stdout.

    Returns:
        The exit code.
    """
    failure = failure_of(error)
    # What cannot be written, as on a full disk, must not hide the exit code.
    with suppress(OSError):
        if os.environ.get(DEBUG) and not isinstance(error, click.ClickException):
            click.echo(printable("".join(traceback.format_exception(error))), err=True, nl=False)
        click.echo(printable(failure.message), err=True)
    if as_json:
        plain = failure.message.removeprefix("error: ")
        with suppress(OSError):
            print_json({"error": {**asdict(failure), "message": plain}})
    return failure.code


def _place(error: OSError) -> str:
    return "" if error.filename is None else f"{os.fsdecode(error.filename)}: "
