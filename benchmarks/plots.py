"""Plots of lines over a linear grid that begins at zero, so that proportions can be seen; drawn by matplotlib."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from io import StringIO
from itertools import cycle
from typing import Any

from matplotlib import color_sequences, style
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import StrMethodFormatter
from matplotlib.typing import ColorType

_STYLE: Sequence[str | dict[str, Any]] = [
    "default",  # whatever the person's own settings are
    {
        "figure.figsize": (7.2, 4.4),
        "figure.constrained_layout.use": True,
        "axes.axisbelow": True,
        "axes.grid": True,
        "grid.color": "#dddddd",
        "lines.markersize": 7,
        "text.parse_math": False,  # a dollar is a dollar
        "svg.fonttype": "none",  # words stay words, which can be searched and read aloud
        "svg.hashsalt": "edgetune",  # names of elements are random without it
    },
]
"""The same figures give the same file."""
_COLOURS = color_sequences["petroff6"]
"""Chosen to be told apart with any colour vision (Petroff 2021)."""
_MARKERS = "os^DvP"
"""Shapes of points, for whoever sees no colours."""


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


def line_plot(title: str, x_label: str, y_label: str, curves: Sequence[Curve]) -> Figure:
    """Draw medians as points, their ranges as bars and straight lines dashed.

    Args:
        title: Above the plot.
        x_label: Of the axis across, with its unit.
        y_label: Of the axis upwards, with its unit.
        curves: Each gets a colour and a shape of its points.

    Raises:
        ValueError: There is nothing to draw.
    """
    if not any(curve.marks for curve in curves):
        raise ValueError(f"{title}: no points to draw")
    with style.context(_STYLE):
        figure = Figure()
        axes = figure.add_subplot()
        axes.set_title(title)
        for axis, label in ((axes.xaxis, x_label), (axes.yaxis, y_label)):
            axis.set_label_text(label)
            axis.set_major_formatter(StrMethodFormatter("{x:,g}"))
        for curve, colour, marker in zip(curves, cycle(_COLOURS), cycle(_MARKERS), strict=False):
            _draw(axes, curve, colour, marker)
        axes.set_xlim(left=0)
        axes.set_ylim(bottom=0)
        figure.legend(loc="outside lower center", ncols=2)  # where it covers nothing
    return figure


def _draw(axes: Axes, curve: Curve, colour: ColorType, marker: str) -> None:
    across = [mark.x for mark in curve.marks]
    below = [mark.y - mark.least for mark in curve.marks]
    above = [mark.most - mark.y for mark in curve.marks]
    axes.errorbar(
        across, [mark.y for mark in curve.marks], (below, above), color=colour, marker=marker, ls="", label=curve.label
    )
    if curve.fit is not None:
        slope, offset = curve.fit
        ends = (across[0], across[-1])
        axes.plot(ends, [slope * x + offset for x in ends], "--", color=colour)


def svg_text(figure: Figure) -> str:
    """The whole SVG document; it tells no date, and no version of what drew it."""
    written = StringIO()
    with style.context(_STYLE):
        figure.savefig(written, format="svg", metadata={"Date": None, "Creator": None})
    return written.getvalue()
