"""What a run's record says, step by step: a bounded number of points, however long the run was.

A record comes with an adapter from anywhere, so that each line is checked before a number of it is used.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from edgetune.errors import VerificationError

MOST_POINTS = 512
"""Of a curve: more are not told apart on a page."""
LONGEST_LINE = 4096
"""Bytes of a line; those that `train` writes have a tenth."""
_LARGEST = 1e300
"""Of what is measured; a mean of such numbers is still one."""
_MOST_COUNTED = 1 << 53
"""Steps of a run, and tokens of a step: more are not told apart as floats."""
_SLOWEST = 1e-6
"""Tokens a second: less is no speed."""
_FIX = "copy the adapter again from its source"
_KEYS = ("loss", "learning_rate", "grad_norm", "tokens_per_second", "peak_memory_bytes", "memory_bytes")
"""Keys of a line that curves are made of."""


@dataclass(frozen=True)
class Point:
    """Steps that follow each other, as one point."""

    count: int
    x: float
    """Their mean on the axis across, such as the number of the step."""
    mean: float
    least: float
    most: float

    def with_next(self, other: Point) -> Point:
        """Both as one."""
        count = self.count + other.count
        share = other.count / count
        x, mean = (
            # Not the sum by the count, which may be more than a number holds.
            one * (1 - share) + two * share
            for one, two in ((self.x, other.x), (self.mean, other.mean))
        )
        return Point(count, x, mean, min(self.least, other.least), max(self.most, other.most))


@dataclass
class Curve:
    """Points in the order of the run. Where there are too many, two neighbours become one, so that memory is bounded.

    `MOST_POINTS` are the most, and half as many are there at least once there were so many.
    """

    points: list[Point] = field(default_factory=list)
    first: float | None = None
    """The first value, as it was."""
    last: float | None = None
    _width: int = 1

    def add(self, x: float, value: float) -> None:
        """Take the next value."""
        point = Point(1, x, value, value, value)
        self.first = value if self.first is None else self.first
        self.last = value
        if self.points and self.points[-1].count < self._width:
            self.points[-1] = self.points[-1].with_next(point)
        else:
            self.points.append(point)
        if len(self.points) > MOST_POINTS:
            self.points = _halved(self.points)
            self._width *= 2

    def thinned(self, most: int) -> list[Point]:
        """At most so many points, two at least."""
        points = self.points
        while len(points) > max(2, most):
            points = _halved(points)
        return points

    @property
    def least(self) -> float:
        """The lowest value; there is one."""
        return min(point.least for point in self.points)

    @property
    def most(self) -> float:
        """The highest value; there is one."""
        return max(point.most for point in self.points)


def _halved(points: list[Point]) -> list[Point]:
    pairs = zip(points[::2], points[1::2], strict=False)
    joined = [one.with_next(two) for one, two in pairs]
    return joined + (points[-1:] if len(points) % 2 else [])


@dataclass
class History:
    """What was measured in a run."""

    curves: dict[str, Curve] = field(default_factory=dict)
    """By the record's keys; across is the step. One that the record does not have is not there."""
    validation: Curve = field(default_factory=Curve)
    """The validation loss; what was measured before any step is at 0."""
    by_time: Curve = field(default_factory=Curve)
    """The training loss; across are the seconds since the run began."""
    steps: int = 0
    """Number of the last step."""
    tokens: int = 0
    seconds: float = 0.0
    """Of the steps and validations; of the steps alone, where the record does not tell the time."""
    step_seconds: float = 0.0
    """Of the steps alone."""
    best: tuple[int, float] | None = None
    """Step and value of the lowest validation loss after a step."""

    @property
    def tokens_per_second(self) -> float | None:
        """Over all steps; none where the record does not tell."""
        return self.tokens / self.step_seconds if self.step_seconds > 0 else None

    def last(self, key: str) -> float | None:
        """Of the last step that has it."""
        curve = self.curves.get(key)
        return None if curve is None else curve.last

    def take(self, line: dict[str, Any], source: str) -> None:
        """Take the next line of a record.

        Raises:
            VerificationError: It is not what a record holds.
        """
        step = line.get("step")
        if type(step) is not int or not self.steps < step < _MOST_COUNTED:
            raise VerificationError(
                f"{source}: step is {step!r:.40}, expected a whole number above {self.steps}; {_FIX}"
            )
        if (first := _number(line, "initial_validation_loss", source)) is not None:
            self.validation.add(0, first)
        self.steps = step
        for key in _KEYS:
            if (value := _number(line, key, source)) is not None:
                self.curves.setdefault(key, Curve()).add(step, value)
        self._take_time(line, source)
        if (loss := _number(line, "validation_loss", source)) is not None:
            self.validation.add(step, loss)
            if self.best is None or loss < self.best[1]:
                self.best = (step, loss)

    def _take_time(self, line: dict[str, Any], source: str) -> None:
        tokens, speed = line.get("tokens", 0), _number(line, "tokens_per_second", source) or 0.0
        if type(tokens) is not int or not 0 <= tokens < _MOST_COUNTED:
            raise VerificationError(f"{source}: tokens is {tokens!r:.40}, expected a whole number; {_FIX}")
        self.tokens += tokens
        self.step_seconds += tokens / speed if speed > _SLOWEST else 0.0
        seconds = _number(line, "seconds", source)
        self.seconds = self.step_seconds if seconds is None else seconds
        if (loss := _number(line, "loss", source)) is not None:
            self.by_time.add(self.seconds, loss)


def read_history(lines: Iterable[bytes], source: str) -> History:
    """Read the lines of a record.

    Args:
        lines: Each with its end, and none longer than `LONGEST_LINE` and a byte.
        source: What messages call it.

    Raises:
        VerificationError: A line is not what a record holds.
    """
    history = History()
    for number, line in enumerate(lines, 1):
        place = f"{source}:{number}"
        if len(line) > LONGEST_LINE:
            raise VerificationError(f"{place}: has more than {LONGEST_LINE:,} bytes; {_FIX}")
        try:
            value = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise VerificationError(f"{place}: not valid JSON ({error}); {_FIX}") from error
        if not isinstance(value, dict):
            raise VerificationError(f"{place}: expected a JSON object, found {type(value).__name__}; {_FIX}")
        history.take(value, place)
    return history


def lines_of(path: Path) -> Iterator[bytes]:
    """The lines of a file, none longer than what `read_history` then refuses."""
    with path.open("rb") as file:
        while line := file.readline(LONGEST_LINE + 1):
            yield line


def _number(line: dict[str, Any], key: str, source: str) -> float | None:
    """A value of a line; none where it is null or not there.

    Raises:
        VerificationError: It is no finite number.
    """
    value = line.get(key)
    if value is None:
        return None
    # A whole number may be too large for a float.
    if type(value) in (int, float) and abs(value) < _LARGEST and math.isfinite(value):
        return float(value)
    raise VerificationError(f"{source}: {key} is {value!r:.40}, expected a number or null; {_FIX}")

