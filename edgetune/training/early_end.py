"""What ends a run before its last step, between two steps: a signal, a time budget, a pause file."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from time import monotonic
from types import FrameType

from edgetune.errors import EdgetuneError, InterruptedRunError, PausedRunError
from edgetune.machine.signals import ENDING


@dataclass
class Signals:
    """Whether somebody asked the process to end."""

    heard: str = ""
    """The signal's name; empty where none came."""


@contextmanager
def held_back(say: Callable[[str], None]) -> Iterator[Signals]:
    """Let the first signal wait for the end of the step; a second one ends the process as it would without this.

    Signals that are ignored stay so, and outside of the main thread, which alone hears them, nothing changes.

    Args:
        say: Is told that a signal waits.
    """
    signals = Signals()
    if threading.current_thread() is not threading.main_thread():
        yield signals
        return
    previous = {number: signal.getsignal(number) for number in ENDING}
    ours = [number for number, handler in previous.items() if handler not in (signal.SIG_IGN, None)]

    def restore() -> None:
        for number in ours:
            signal.signal(number, previous[number])

    def hear(number: int, frame: FrameType | None) -> None:
        signals.heard = signal.Signals(number).name
        restore()
        text = f"{signals.heard}: the run ends after this step; once more ends it now, with the state that is saved"
        # The signal may have come while the same thread writes, and a stream does not take a line within a line.
        threading.Thread(target=say, args=[text], daemon=True).start()

    for number in ours:
        signal.signal(number, hear)
    try:
        yield signals
    finally:
        restore()


class EarlyEnd:
    """Says after a step whether the run is to end there.

    Args:
        signals: See `held_back`.
        budget_seconds: Wall time that the run may take from now on; none for as long as it takes.
        pause_file: The run pauses when this file is there; none for no such file.
    """

    def __init__(self, signals: Signals, budget_seconds: float | None, pause_file: Path | None) -> None:
        self._signals, self._pause_file = signals, pause_file
        self._end = None if budget_seconds is None else monotonic() + budget_seconds

    @property
    def is_interrupted(self) -> bool:
        """Whether a signal waits."""
        return bool(self._signals.heard)

    def cause(self) -> tuple[type[EdgetuneError], str] | None:
        """What the run ends with now, and why; none where it goes on."""
        if self._signals.heard:
            return InterruptedRunError, f"interrupted by {self._signals.heard}"
        if self._end is not None and monotonic() >= self._end:
            return PausedRunError, "paused by --time-budget"
        if self._pause_file is not None and self._pause_file.exists():
            return PausedRunError, f"paused because {self._pause_file} is there"
        return None
