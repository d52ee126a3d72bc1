"""A record becomes curves of a bounded number of points, and no line of it is believed."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from edgetune.errors import VerificationError
from edgetune.reporting.history import LONGEST_LINE, MOST_POINTS, Curve, History, lines_of, read_history
from support.written_runs import lines_of_run


def history_of(*lines: dict[str, Any]) -> History:
    return read_history([json.dumps(line).encode() + b"\n" for line in lines], "record")


def test_a_short_record_is_there_as_it_is() -> None:
    lines = lines_of_run(steps=20, loss=6.0, every=10)
    history = history_of(*lines)
    for key in ("loss", "learning_rate", "grad_norm", "tokens_per_second", "peak_memory_bytes", "memory_bytes"):
        curve = history.curves[key]
        assert [(point.x, point.mean) for point in curve.points] == [(line["step"], line[key]) for line in lines]
        assert (curve.first, curve.last) == (lines[0][key], lines[-1][key])
    assert [(point.x, point.mean) for point in history.validation.points] == [
        (0, 7.0),
        (10, lines[9]["validation_loss"]),
        (20, lines[19]["validation_loss"]),
    ]
    assert [(point.x, point.mean) for point in history.by_time.points] == [
        (line["seconds"], line["loss"]) for line in lines
    ]
    assert (history.steps, history.tokens, history.seconds) == (20, 2000, 5.0)
    assert history.step_seconds == pytest.approx(5.0)
    assert history.tokens_per_second == pytest.approx(400.0)
    assert history.best == (20, lines[19]["validation_loss"])


def test_many_steps_become_few_points_whose_means_and_extremes_are_those_of_the_steps() -> None:
    values = np.random.default_rng(3).normal(size=10_007)
    curve = Curve()
    for step, value in enumerate(values, 1):
        curve.add(step, float(value))
    assert MOST_POINTS / 2 <= len(curve.points) <= MOST_POINTS
    assert sum(point.count for point in curve.points) == len(values)
    assert (curve.first, curve.last) == (values[0], values[-1])
    assert (curve.least, curve.most) == (values.min(), values.max())
    begin = 0
    for point in curve.points:
        part, steps = values[begin : begin + point.count], np.arange(begin + 1, begin + 1 + point.count)
        assert (point.mean, point.x) == pytest.approx((part.mean(), steps.mean()))
        assert (point.least, point.most) == (part.min(), part.max())
        begin += point.count
    thin = curve.thinned(40)
    assert 20 <= len(thin) <= 40
    assert sum(point.count * point.mean for point in thin) == pytest.approx(values.sum())


def test_a_record_without_time_and_memory_is_of_an_earlier_version() -> None:
    lines = [{key: line[key] for key in line if key not in ("seconds", "memory_bytes")} for line in lines_of_run(8)]
    history = history_of(*lines)
    assert "memory_bytes" not in history.curves
    assert history.seconds == pytest.approx(8 * 100 / 400)


def test_null_is_left_out() -> None:
    history = history_of({"step": 1, "loss": 2.0, "grad_norm": None}, {"step": 2, "loss": 1.0, "grad_norm": 3.0})
    assert [point.x for point in history.curves["grad_norm"].points] == [2]
    assert history.tokens_per_second is None


@pytest.mark.parametrize(
    ("line", "told"),
    [
        (b"{", "not valid JSON"),
        (b"\xff\n", "not valid JSON"),
        (b"[" * 4000, "not valid JSON"),
        (b"[1]", "expected a JSON object, found list"),
        (b"{}", "step is None, expected a whole number above 1"),
        (b'{"step": 1}', "step is 1, expected a whole number above 1"),
        (b'{"step": true}', "step is True"),
        (b'{"step": 9007199254740992}', "step is 9007199254740992"),
        (b'{"step": 2, "loss": "<b>"}', "loss is '<b>', expected a number or null"),
        (b'{"step": 2, "loss": NaN}', "loss is nan"),
        (b'{"step": 2, "loss": 1e400}', "loss is inf"),
        (b'{"step": 2, "loss": true}', "loss is True"),
        (b'{"step": 2, "loss": 1' + b"0" * 400 + b"}", "loss is 1000"),
        (b'{"step": 2, "grad_norm": {}}', "grad_norm is {}"),
        (b'{"step": 2, "tokens": 1.5}', "tokens is 1.5, expected a whole number"),
        (b'{"step": 2, "tokens": -1}', "tokens is -1"),
        (b'{"step": 2, "seconds": []}', "seconds is []"),
        (b'{"step": 2, "validation_loss": "1"}', "validation_loss is '1'"),
        (b'{"step": 2, "initial_validation_loss": "1"}', "initial_validation_loss is '1'"),
        (b'{"step": 2, "more": "' + b"x" * LONGEST_LINE + b'"}', f"has more than {LONGEST_LINE:,} bytes"),
    ],
)
def test_what_is_no_record_is_refused_with_its_line(tmp_path: Path, line: bytes, told: str) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(b'{"step": 1, "loss": 1.0}\n' + line + b"\n")
    with pytest.raises(VerificationError) as error:
        read_history(lines_of(path), str(path))
    assert str(error.value).startswith(f"{path}:2: {told}")
    assert len(str(error.value)) < 300


def test_numbers_at_the_edge_stay_finite() -> None:
    def lines() -> Iterator[bytes]:
        for step in range(1, 3000):
            yield json.dumps(
                {"step": step, "loss": 9e299, "tokens": 2**53 - 1, "tokens_per_second": 1e-300, "seconds": 1e299}
            ).encode()

    history = read_history(lines(), "record")
    assert np.isfinite([point.mean for point in history.curves["loss"].points]).all()
    assert np.isfinite([history.seconds, history.step_seconds, float(history.tokens)]).all()
