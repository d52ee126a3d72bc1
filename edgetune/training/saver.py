"""When the state of a run is saved, and what happens when it cannot be."""

from __future__ import annotations

from collections.abc import Callable
from time import monotonic

from edgetune.errors import EdgetuneError
from edgetune.training.saved_run import SavedRun, SavedState

SHARE = 0.02
"""Of the time, that saving may take where nobody says how often."""
_SLOW_DISK = 20e6
"""Bytes a second that a state is expected to be written with before one was: a slow memory card."""
_LEAST_SECONDS = 0.005
"""Of a save: flushing a file takes that long, however small it is."""


class Saver:
    """Saves states of a run.

    Args:
        saved: Where.
        every: After how many steps; 0 for never, none for as often as takes less than `SHARE` of the time.
        size: Bytes of a state, about.
        say: Hears that a state cannot be saved.
    """

    def __init__(self, saved: SavedRun, every: int | None, size: int, say: Callable[[str], None]) -> None:
        self._saved, self._every, self._say = saved, every, say
        self._cost = _LEAST_SECONDS + size / _SLOW_DISK
        self._last_time, self._last_steps = monotonic(), saved.steps()

    @property
    def saves(self) -> bool:
        """Whether there are to be any states."""
        return self._every != 0

    @property
    def rhythm(self) -> str:
        """How often, in a few words: what is lost at most."""
        if self._every is not None:
            return f"every {self._every} steps" if self._every else "never"
        return f"about every {self._cost / SHARE:.1f} s"

    def is_due(self, steps: int) -> bool:
        """Whether the state after so many steps is to be saved."""
        if self._every is not None:
            return self._every > 0 and steps % self._every == 0
        return monotonic() - self._last_time >= self._cost / SHARE

    def save(self, state: Callable[[], SavedState], steps: int, *, again: bool = False) -> bool:
        """Save the state after so many steps, unless it is there already; a failure is said, and the run goes on.

        Args:
            state: Gives it.
            steps: That were applied.
            again: Even where there is one of that step, which says less.

        Returns:
            Whether it is there.
        """
        if not self.saves:
            return False
        if steps == self._last_steps and not again:
            return True
        begin = monotonic()
        try:
            self._saved.save(state())
        except (OSError, EdgetuneError) as error:
            older = "no state is there" if self._last_steps is None else f"that of step {self._last_steps} stays"
            reason = error.strerror if isinstance(error, OSError) else error
            self._say(f"the state after step {steps} cannot be saved ({reason}): {older}, and the training goes on")
            self._last_time = monotonic()
            return False
        self._last_time, self._last_steps = monotonic(), steps
        self._cost = max(_LEAST_SECONDS, self._last_time - begin)
        return True

    @property
    def last_steps(self) -> int | None:
        """Of the newest state; none where there is none."""
        return self._last_steps
