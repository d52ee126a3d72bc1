"""Plots as SVG: lines over a linear grid that begins at zero, so that proportions can be seen."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from math import floor, log10

WIDTH, HEIGHT = 720, 440
_LEFT, _RIGHT, _TOP, _BOTTOM = 70, 20, 50, 60
_COLOURS = ("#0b62a4", "#c8501e", "#3a8a3a", "#7b4ea3", "#8a6d1d")
_TICKS = 5
"""About so many steps along an axis."""


@dataclass(frozen=True)
class Mark:
    """A measured point: median, and the range as a bar."""

    x: float
    y: float
    least: float
    most: float


@dataclass(frozen=True)
class Curve:
    """A line of a plot."""

    label: str
    marks: Sequence[Mark]
    fit: tuple[float, float] | None = None
    """Slope and offset of a straight line, drawn dashed."""


def line_plot(title: str, x_label: str, y_label: str, curves: Sequence[Curve]) -> str:
    """A whole SVG document.

    Raises:
        ValueError: There is nothing to draw.
    """
    marks = [mark for curve in curves for mark in curve.marks]
    if not marks:
        raise ValueError(f"{title}: no points to draw")
    axes = _Axes(_steps(max(mark.x for mark in marks)), _steps(max(mark.most for mark in marks)))
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" font-family="sans-serif">',
        f'<rect width="{WIDTH}" height="{HEIGHT}" fill="white"/>',
        _text(WIDTH / 2, 24, title, size=16),
        _text((_LEFT + WIDTH - _RIGHT) / 2, HEIGHT - 14, x_label),
        _text(18, (_TOP + HEIGHT - _BOTTOM) / 2, y_label, turned=True),
        *axes.grid(),
    ]
    for number, curve in enumerate(curves):
        colour = _COLOURS[number % len(_COLOURS)]
        parts += _curve(curve, axes, colour)
        row = _TOP + 18 + 18 * number
        parts.append(f'<rect x="{_LEFT + 12}" y="{row - 10}" width="12" height="12" fill="{colour}"/>')
        parts.append(_text(_LEFT + 30, row, curve.label, anchor="start"))
    return "\n".join([*parts, "</svg>", ""])


@dataclass(frozen=True)
class _Axes:
    """From figures to places on the sheet; both axes begin at zero and end at their last tick."""

    x_ticks: Sequence[float]
    y_ticks: Sequence[float]

    def place(self, x: float, y: float) -> tuple[float, float]:
        across = _LEFT + x / self.x_ticks[-1] * (WIDTH - _LEFT - _RIGHT)
        down = HEIGHT - _BOTTOM - y / self.y_ticks[-1] * (HEIGHT - _TOP - _BOTTOM)
        return round(across, 1), round(down, 1)

    def grid(self) -> list[str]:
        parts = []
        for tick in self.x_ticks:
            across, bottom = self.place(tick, 0)
            parts += [_line((across, _TOP), (across, bottom), "#ddd"), _text(across, bottom + 18, f"{tick:,g}")]
        for tick in self.y_ticks:
            left, down = self.place(0, tick)
            parts += [_line((left, down), (WIDTH - _RIGHT, down), "#ddd")]
            parts += [_text(left - 8, down + 4, f"{tick:,g}", anchor="end")]
        return parts


def _steps(largest: float) -> list[float]:
    """Ticks from zero to the first one that is not below `largest`, at 1, 2 or 5 times a power of ten."""
    if largest <= 0:
        return [0.0, 1.0]
    power = 10.0 ** floor(log10(largest / _TICKS))
    step = next(step for step in (power, 2 * power, 5 * power, 10 * power) if step * _TICKS >= largest)
    ticks = [0.0]
    while ticks[-1] < largest:
        ticks.append(round(len(ticks) * step, 10))
    return ticks


def _curve(curve: Curve, axes: _Axes, colour: str) -> list[str]:
    parts = []
    if curve.fit is not None:
        slope, offset = curve.fit
        ends = [(x, slope * x + offset) for x in (curve.marks[0].x, curve.marks[-1].x)]
        parts.append(_line(axes.place(*ends[0]), axes.place(*ends[1]), colour, dashed=True))
    for mark in curve.marks:
        across, down = axes.place(mark.x, mark.y)
        parts.append(_line(axes.place(mark.x, mark.least), axes.place(mark.x, mark.most), colour))
        parts.append(f'<circle cx="{across}" cy="{down}" r="4" fill="{colour}"/>')
    return parts


def _line(start: tuple[float, float], end: tuple[float, float], colour: str, *, dashed: bool = False) -> str:
    dashes = ' stroke-dasharray="6 4"' if dashed else ""
    return f'<line x1="{start[0]}" y1="{start[1]}" x2="{end[0]}" y2="{end[1]}" stroke="{colour}"{dashes}/>'


def _text(x: float, y: float, text: str, *, size: int = 13, anchor: str = "middle", turned: bool = False) -> str:
    turn = f' transform="rotate(-90 {x} {y})"' if turned else ""
    return f'<text x="{x}" y="{y}" font-size="{size}" text-anchor="{anchor}"{turn}>{escape(text)}</text>'
