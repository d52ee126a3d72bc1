"""A run rests while there is a reason, saves its state before, and hears signals meanwhile."""

from __future__ import annotations

from pathlib import Path

import pytest

from edgetune.config import TrainConfig
from edgetune.training import rest as module
from edgetune.training import train
from edgetune.training.rest import Rest
from edgetune.training.saved_run import SavedRun
from support.golden import BUNDLE, TRAIN
from support.recorder import Recorder


@pytest.fixture
def readings(monkeypatch: pytest.MonkeyPatch) -> dict[str, list[float | None]]:
    """What the sensors say next, the last value from then on."""
    found: dict[str, list[float | None]] = {"battery_percent": [None], "highest_temperature": [None]}

    def reader(name: str) -> float | None:
        values = found[name]
        return values.pop(0) if len(values) > 1 else values[0]

    for name in found:
        monkeypatch.setattr(module, name, lambda name=name: reader(name))
    monkeypatch.setattr(module, "sleep", lambda seconds: None)
    return found


def test_it_rests_until_the_machine_is_cooler(readings: dict[str, list[float | None]]) -> None:
    readings["highest_temperature"] = [60.0, 85.0, 82.0, 78.0, 76.0, 74.0]
    said: list[str] = []
    calls: list[str] = []
    rest = Rest(None, 80.0, said.append)
    rest.take(before=lambda: calls.append("save"), look=lambda: calls.append("look"))
    assert said == ["the run rests: the machine is at 85 °C, above 80 °C", "the run goes on"]
    assert calls == ["save", "look", "look", "look"]
    rest.take(before=lambda: calls.append("save again"), look=lambda: None)
    assert "save again" not in calls


def test_what_no_sensor_tells_changes_nothing(readings: dict[str, list[float | None]]) -> None:
    said: list[str] = []
    rest = Rest(20.0, 80.0, said.append)
    assert [line.split(":")[0] for line in said] == [
        "this system tells no battery level",
        "this system tells no temperature",
    ]
    assert rest.reason() == ""


def test_a_run_saves_its_state_before_it_rests(tmp_path: Path, readings: dict[str, list[float | None]]) -> None:
    # The first look is at whether there is a battery.
    readings["battery_percent"] = [90.0, 90.0, 15.0, 15.0, 15.0, 60.0]
    output, seen, saved = tmp_path / "adapter", Recorder(), []
    notice = seen.on_notice

    def on_notice(text: str) -> None:
        notice(text)
        saved.append(SavedRun(output).steps())

    seen.on_notice = on_notice  # type: ignore[method-assign]
    config = TrainConfig(runtime="onnxruntime", steps=6, batch_size=2, save_steps=100, pause_below_battery=20.0)
    train(BUNDLE, TRAIN, output, config, observer=seen)
    assert seen.notices == ["the run rests: the battery is at 15 %, below 20 %", "the run goes on"]
    assert saved == [2, 2]
    assert len(seen.steps) == 6
