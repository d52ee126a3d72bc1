"""What stands above the bar while a run is watched: the curve of its loss, validation, and memory."""

from __future__ import annotations

from collections.abc import Iterable

from rich.console import Console, RenderableType
from rich.progress import Progress, ProgressColumn
from rich.text import Text

from edgetune.reporting.history import Curve
from edgetune.text.block_plot import block_rows
from edgetune.text.byte_size import bytes_text
from edgetune.training.observer import StepMetrics

_HEIGHT = 5
"""Lines of the curve."""
_LEAST_LINES = 16
"""Of a terminal: a lower one shows the bar alone."""
_MOST_COLUMNS = 96
_LEAST_POINTS = 4
"""Fewer are no curve yet."""


class Watched:
    """What a run has measured so far, in a bounded number of points."""

    def __init__(self) -> None:
        self._loss = Curve()
        self._steps: tuple[int, int] | None = None
        """The first and the last."""
        self._validation: list[float] = []
        """The first, the lowest and the last."""
        self._memory: int | None = None

    def step(self, metrics: StepMetrics) -> None:
        """Take a step."""
        self._loss.add(metrics.step, metrics.loss)
        self._steps = (self._steps[0] if self._steps else metrics.step, metrics.step)
        self._memory = metrics.memory_bytes

    def validation(self, loss: float) -> None:
        """Take a measurement on the validation rows."""
        first, lowest, _ = self._validation or (loss, loss, loss)
        self._validation = [first, min(lowest, loss), loss]

    def lines(self, columns: int) -> list[str]:
        """Lines of text for a terminal of so many columns; none while there is no curve."""
        labels = len("00.0000 ┤")
        points = self._loss.thinned(min(columns - labels - 1, _MOST_COLUMNS))
        if self._steps is None or len(points) < _LEAST_POINTS:
            return []
        means = [point.mean for point in points]
        rows = block_rows(means, _HEIGHT)
        sides = [max(means), *[None] * (_HEIGHT - 2), min(means)]
        drawn = [
            f"{'' if side is None else format(side, '.4f'):>{labels - 2}} ┤{row}"
            for side, row in zip(sides, rows, strict=True)
        ]
        first, last = self._steps
        return [f"loss of steps {first:,} to {last:,}", *drawn, *self._words()]

    def _words(self) -> list[str]:
        told = []
        if self._validation:
            first, lowest, last = self._validation
            told.append(f"validation loss {first:.4f} → {last:.4f}, lowest {lowest:.4f}")
        if self._memory is not None:
            told.append(f"memory now {bytes_text(self._memory)}")
        return ["; ".join(told)] if told else []


class LiveProgress(Progress):
    """A progress bar with the curve of the loss above it.

    Args:
        columns: Of the bar.
        console: The terminal.
        watched: What is measured.
    """

    def __init__(self, *columns: ProgressColumn, console: Console, watched: Watched) -> None:
        self._watched, self._terminal = watched, console
        super().__init__(*columns, console=console, expand=True)

    def get_renderables(self) -> Iterable[RenderableType]:
        """The curve, where the terminal has room and characters for it, and the bar."""
        size, has_blocks = self._terminal.size, self._terminal.encoding.startswith("utf")
        if has_blocks and size.height >= _LEAST_LINES:
            lines = self._watched.lines(size.width)
            if lines:
                yield Text("\n".join(lines), no_wrap=True, overflow="crop")
        yield self.make_tasks_table(self.tasks)
