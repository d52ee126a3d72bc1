"""Curves lie where their values say, on round grids."""

from __future__ import annotations

import re

import pytest

from edgetune.reporting.history import MOST_POINTS, Curve
from edgetune.reporting.plot import BOTTOM, HEIGHT, LEFT, RIGHT, TOP, WIDTH, Line, Plot, plot


def curve_of(*values: float) -> Curve:
    curve = Curve()
    for step, value in enumerate(values, 1):
        curve.add(step, value)
    return curve


def plot_of(*curves: Curve, most_points: int = MOST_POINTS, is_marked: bool = False) -> Plot:
    lines = [Line(f"run {number}", number, curve, is_marked=is_marked) for number, curve in enumerate(curves)]
    drawn = plot("Loss", "step", "nats", lines, "{:g}".format, most_points=most_points)
    assert drawn is not None
    return drawn


def places(path: str) -> list[tuple[float, float]]:
    return [(float(x), float(y)) for x, y in re.findall(r"[ML]([\d.]+) ([\d.]+)", path)]


def test_points_lie_on_the_grid_where_their_values_are() -> None:
    drawn = plot_of(curve_of(8, 4, 2, 0))
    assert [tick.label for tick in drawn.y_ticks] == ["0", "2", "4", "6", "8"]
    assert (float(drawn.y_ticks[0].at), float(drawn.y_ticks[-1].at)) == (HEIGHT - BOTTOM, TOP)
    assert [tick.label for tick in drawn.x_ticks] == ["0", "1", "2", "3", "4"]
    assert (float(drawn.x_ticks[0].at), float(drawn.x_ticks[-1].at)) == (LEFT, WIDTH - RIGHT)
    across = [float(tick.at) for tick in drawn.x_ticks]
    up = {tick.label: float(tick.at) for tick in drawn.y_ticks}
    (line,) = drawn.lines
    assert places(line.path) == [
        (across[1], up["8"]), (across[2], up["4"]), (across[3], up["2"]), (across[4], up["0"])
    ]  # fmt: skip
    assert (line.band, line.marks) == ("", [])
    assert line.figures == ["8", "0", "8", "0"]
    assert drawn.alt == "run 0: from 8 to 0, lowest 0, highest 8."


@pytest.mark.parametrize(
    ("values", "labels"),
    [
        ((0.0, 1e-3), ["0", "0.0002", "0.0004", "0.0006", "0.0008", "0.001"]),
        ((6.3, 0.02), ["0", "2", "4", "6", "8"]),
        ((-1.0, 1.0), ["-1", "-0.5", "0", "0.5", "1"]),
        ((9e299,), ["0", "2e+299", "4e+299", "6e+299", "8e+299", "1e+300"]),
        ((0.0, 0.0), ["0", "0.2", "0.4", "0.6", "0.8", "1"]),
        ((5e-324,), ["0", "0.2", "0.4", "0.6", "0.8", "1"]),
    ],
)
def test_the_grid_is_round_begins_at_zero_and_holds_all(values: tuple[float, ...], labels: list[str]) -> None:
    drawn = plot_of(curve_of(*values))
    assert [tick.label for tick in drawn.y_ticks][: len(labels)] == labels
    for x, y in places(drawn.lines[0].path):
        assert LEFT <= x <= WIDTH - RIGHT
        assert TOP <= y <= HEIGHT - BOTTOM


def test_points_of_several_steps_have_a_band_and_a_few_measured_ones_marks() -> None:
    drawn = plot_of(curve_of(4, 0, 4, 0), most_points=2)
    (line,) = drawn.lines
    assert len(places(line.path)) == 2
    assert {y for _, y in places(line.band)} == {float(drawn.y_ticks[0].at), float(drawn.y_ticks[-1].at)}
    assert len(plot_of(curve_of(1, 2, 3), is_marked=True).lines[0].marks) == 3
    assert len(plot_of(curve_of(*range(90)), is_marked=True).lines[0].marks) == 0
    assert len(plot_of(curve_of(1.0)).lines[0].marks) == 1, "a single point is no line"


def test_lines_share_the_axes_and_those_without_points_are_left_out() -> None:
    drawn = plot_of(curve_of(1, 1), Curve(), curve_of(2, 2, 2, 2))
    assert [line.line.colour for line in drawn.lines] == [0, 2]
    assert places(drawn.lines[0].path)[-1][0] < places(drawn.lines[1].path)[-1][0]
    assert plot("Loss", "step", "nats", [Line("none", 0, Curve())], str, most_points=9) is None
