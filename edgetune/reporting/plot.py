"""Curves as the numbers of an SVG picture: where lines, bands, marks and ticks lie. The page's template draws them."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from edgetune.reporting.history import Curve, Point

WIDTH, HEIGHT = 640, 280
"""Of a picture, in its own units."""
LEFT, RIGHT, TOP, BOTTOM = 72, 14, 12, 30
"""Margins of the field in which curves lie."""
_TICKS = 5
"""About so many on an axis."""
_LEAST_SPAN = 1e-200
"""Of an axis: less is nothing, and could not be divided."""
_MOST_MARKS = 40
"""Points of a line that are marked each; more would cover it."""


@dataclass(frozen=True)
class Line:
    """A curve that is to be drawn."""

    label: str
    """Whose curve it is, and of what."""
    colour: int
    """Number of the run, from 0."""
    curve: Curve
    is_dashed: bool = False
    is_marked: bool = False
    """Each point is a dot: it was measured now and then."""


@dataclass(frozen=True)
class Tick:
    """A line of the grid."""

    at: str
    """Its place along the axis."""
    label: str


@dataclass(frozen=True)
class Drawn:
    """A curve's place in the picture."""

    line: Line
    path: str
    """`d` of an SVG path."""
    band: str
    """The same of the area between lowest and highest, where a point stands for several steps; else empty."""
    marks: list[tuple[str, str]]
    """Centres of dots."""
    figures: list[str]
    """First, lowest, highest and last value, in words."""


@dataclass(frozen=True)
class Plot:
    """A picture."""

    title: str
    x_label: str
    y_label: str
    alt: str
    """What it shows, for whoever does not see it."""
    x_ticks: list[Tick]
    y_ticks: list[Tick]
    lines: list[Drawn]


def plot(
    title: str,
    x_label: str,
    y_label: str,
    lines: Sequence[Line],
    words: Callable[[float], str],
    *,
    most_points: int,
) -> Plot | None:
    """Lay out curves over a linear grid, whose upward axis begins at zero, so that proportions can be seen.

    Args:
        title: Above the picture.
        x_label: Of the axis across, with its unit.
        y_label: Of the axis upwards, with its unit.
        lines: Those that have no points are left out.
        words: How a value of the upward axis is written.
        most_points: Of each curve.

    Returns:
        None where no line has points.
    """
    lines = [line for line in lines if line.curve.points]
    if not lines:
        return None
    left, right = 0.0, max(line.curve.points[-1].x for line in lines)
    low, high = min(0.0, *(line.curve.least for line in lines)), max(0.0, *(line.curve.most for line in lines))
    across = _Axis(left, right, LEFT, WIDTH - RIGHT)
    up = _Axis(low, high, HEIGHT - BOTTOM, TOP)
    return Plot(
        title=title,
        x_label=x_label,
        y_label=y_label,
        alt=" ".join(_in_words(line, words) for line in lines),
        x_ticks=across.ticks(lambda value: f"{value:,.10g}"),
        y_ticks=up.ticks(words),
        lines=[_drawn(line, across, up, words, most_points) for line in lines],
    )


class _Axis:
    """A linear scale whose ends are round numbers.

    Args:
        low: The lowest value.
        high: The highest.
        begin: Where the lowest lies in the picture.
        end: Where the highest lies.
    """

    def __init__(self, low: float, high: float, begin: int, end: int) -> None:
        high = high if high - low > _LEAST_SPAN else low + 1
        self._step = _round_step(high - low)
        self._low = math.floor(low / self._step) * self._step
        self._high = math.ceil(high / self._step) * self._step
        self._begin, self._end = begin, end

    def at(self, value: float) -> str:
        """Where a value lies."""
        share = (value - self._low) / (self._high - self._low)
        return f"{self._begin + share * (self._end - self._begin):.1f}"

    def ticks(self, words: Callable[[float], str]) -> list[Tick]:
        """Lines of the grid, from the lowest to the highest."""
        count = round((self._high - self._low) / self._step)
        values = (self._low + number * self._step for number in range(count + 1))
        return [Tick(self.at(value), words(value)) for value in values]


def _round_step(span: float) -> float:
    """1, 2 or 5 times a power of ten, of which about `_TICKS` make the span."""
    power = 10.0 ** math.floor(math.log10(span / _TICKS))
    return next(factor * power for factor in (1, 2, 5, 10) if factor * power * _TICKS >= span * 0.999)


def _drawn(line: Line, across: _Axis, up: _Axis, words: Callable[[float], str], most_points: int) -> Drawn:
    points = line.curve.thinned(most_points)
    places = [(across.at(point.x), up.at(point.mean)) for point in points]
    marked = len(places) == 1 or (line.is_marked and len(places) <= _MOST_MARKS)
    curve = line.curve
    return Drawn(
        line=line,
        path=_path(places),
        band=_band(points, across, up),
        marks=places if marked else [],
        figures=[words(value) for value in (curve.first or 0.0, curve.least, curve.most, curve.last or 0.0)],
    )


def _band(points: Sequence[Point], across: _Axis, up: _Axis) -> str:
    if all(point.count == 1 for point in points):
        return ""
    upper = [(across.at(point.x), up.at(point.most)) for point in points]
    lower = [(across.at(point.x), up.at(point.least)) for point in reversed(points)]
    return f"{_path([*upper, *lower])}Z"


def _path(places: Sequence[tuple[str, str]]) -> str:
    return "".join(f"{'L' if number else 'M'}{x} {y}" for number, (x, y) in enumerate(places))


def _in_words(line: Line, words: Callable[[float], str]) -> str:
    curve = line.curve
    first, last = words(curve.first or 0.0), words(curve.last or 0.0)
    lowest, highest = words(curve.least), words(curve.most)
    return f"{line.label}: from {first} to {last}, lowest {lowest}, highest {highest}."
