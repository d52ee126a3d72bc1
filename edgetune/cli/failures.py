"""From an exception to a line for people, an object for programs, and an exit code, which nothing else knows."""

from __future__ import annotations

import os
import threading
import traceback
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path

import click

from edgetune.cli.output import print_json
from edgetune.errors import (
    DataError,
    EdgetuneError,
    IncompatibleError,
    InterruptedRunError,
    LockedError,
    MissingDependencyError,
    PausedRunError,
    ResourceError,
    UsageError,
    VerificationError,
)
from edgetune.machine.disk import no_room
from edgetune.machine.exhaustion import ADVICE, lack_behind
from edgetune.text.printable import printable

EXIT_CODES: dict[type[EdgetuneError], int] = {
    EdgetuneError: 1,
    MissingDependencyError: 1,
    UsageError: 2,
    DataError: 3,
    IncompatibleError: 4,
    VerificationError: 5,
    ResourceError: 6,
    LockedError: 7,
    PausedRunError: 75,
    InterruptedRunError: 130,
}
"""By who must act; a more special error has the code of the nearest class that is listed."""
INTERRUPTED = EXIT_CODES[InterruptedRunError]
DEBUG = "EDGETUNE_DEBUG"
"""Environment variable that shows tracebacks."""
_SHOWN = 160
"""Characters of what a library said last."""


@dataclass(frozen=True)
class Failure:
    """What the command line says of an exception."""

    code: int
    """The exit code."""
    message: str
    problems: list[str] = field(default_factory=list)
    """`file:line: reason` of each bad row that is shown."""


def exit_code_of(kind: type[EdgetuneError]) -> int:
    """The exit code of a command that ends with such an error."""
    return next(EXIT_CODES[known] for known in kind.__mro__ if known in EXIT_CODES)


def failure_of(error: BaseException) -> Failure:
    """Sort an exception by who must act."""
    match error:
        case DataError():
            return Failure(exit_code_of(type(error)), f"error: {error}", error.problems[: error.shown])
        case UsageError() | LockedError() | ResourceError():
            return Failure(exit_code_of(type(error)), f"error: {error}")
        case EdgetuneError() if lack := lack_behind(error):
            return Failure(exit_code_of(ResourceError), f"error: {error}\n{ADVICE[lack]}")
        case EdgetuneError():
            return Failure(exit_code_of(type(error)), f"error: {error}")
        case click.UsageError():
            hint = f"\nTry '{error.ctx.command_path} --help'." if error.ctx else ""
            return Failure(error.exit_code, f"error: {error.format_message()}{hint}")
        case click.ClickException():
            return Failure(error.exit_code, f"error: {error.format_message()}")
        case KeyboardInterrupt() if not _threads_left():
            # OpenBLAS, in numpy, interrupts its own process where it cannot start its threads.
            return Failure(exit_code_of(ResourceError), f"error: {ADVICE['memory']} (no more threads can be started)")
        case KeyboardInterrupt() | click.Abort():
            return Failure(INTERRUPTED, "error: interrupted")
        case OSError() if error.filename is not None and lack_behind(error) == "room":
            message = str(no_room(Path(os.fsdecode(error.filename)), 0, error))
            return Failure(exit_code_of(ResourceError), f"error: {message}")
        case _ if lack := lack_behind(error):
            place = _place(error) if isinstance(error, OSError) else ""
            return Failure(exit_code_of(ResourceError), f"error: {place}{ADVICE[lack]}{_reason(error)}")
        case ModuleNotFoundError() if not (error.name or "edgetune").startswith("edgetune"):
            fix = 'pip install "edgetune[host]" brings what prepare and export need; see `edgetune doctor`'
            return Failure(exit_code_of(MissingDependencyError), f"error: {error.name} is not installed; {fix}")
        case OSError() if error.filename is not None:
            return Failure(exit_code_of(EdgetuneError), f"error: {_place(error)}{error.strerror}")
        case _:
            reason = " ".join(f"{type(error).__name__}: {error}".split())
            advice = f"run again with {DEBUG}=1 for the traceback"
            return Failure(exit_code_of(EdgetuneError), f"internal error: {reason:.400}; {advice}")


def tell_failure(error: BaseException, *, as_json: bool) -> int:
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


def _threads_left() -> bool:
    thread = threading.Thread(target=int)
    try:
        thread.start()
    except RuntimeError:
        return False
    thread.join()
    return True


def _reason(error: BaseException) -> str:
    """What it was in the words of whoever said it, in parentheses; nothing where they say nothing."""
    said = " ".join(str(error.strerror if isinstance(error, OSError) else error).split())
    # Exceptions of C++ begin with where they were thrown, and end with why.
    shown = said if len(said) <= _SHOWN else f"…{said[-_SHOWN:]}"
    return f" ({shown})" if said else ""


def _place(error: OSError) -> str:
    return "" if error.filename is None else f"{os.fsdecode(error.filename)}: "
