"""Ctrl-C, SIGTERM and a closed terminal clean up and end a command, whatever the libraries in it make of them."""

from __future__ import annotations

import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

from edgetune.machine.signals import ENDING

_heard = threading.Event()


class Interrupted(KeyboardInterrupt):
    """Ctrl-C, SIGTERM or SIGHUP.

    Its own type, because CPython (`run_eval_code_obj`) remembers that a plain KeyboardInterrupt left code that was run
    from a string, as dataclasses are made, and ends by the signal then instead of with the exit code.
    """


@contextmanager
def termination_interrupts() -> Iterator[None]:
    """Let all of them clean up as Ctrl-C does, and let nothing hide an interruption: libraries make errors of it."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    _heard.clear()

    def interrupt(number: int, frame: FrameType | None) -> None:
        _heard.set()
        raise Interrupted

    def lost(unraisable: sys.UnraisableHookArgs) -> None:
        # Raised where nobody can catch it, as in `__del__`. It is remembered; a traceback would only be noise.
        if not isinstance(unraisable.exc_value, Interrupted):
            before(unraisable)

    ours = [number for number in ENDING if signal.getsignal(number) is not signal.SIG_IGN]
    previous = {number: signal.signal(number, interrupt) for number in ours}
    before, sys.unraisablehook = sys.unraisablehook, lost
    try:
        # Where the block ends well its work is done and written, and an interruption that was lost came too late.
        yield
    except Exception as error:
        if _heard.is_set():
            raise Interrupted from error
        raise
    finally:
        _heard.clear()
        sys.unraisablehook = before
        for number, handler in previous.items():
            signal.signal(number, handler or signal.SIG_DFL)


def raise_if_interrupted() -> None:
    """For between stages: a library may have caught what was raised, and gone on.

    Raises:
        Interrupted: The command was interrupted.
    """
    if _heard.is_set():
        raise Interrupted
