"""Battery and temperatures as psutil gives them on systems of several kinds."""

from __future__ import annotations

import sys
from collections import namedtuple

import psutil
import pytest

from edgetune.errors import MissingDependencyError
from edgetune.machine.sensors import battery_percent, highest_temperature

Battery = namedtuple("Battery", "percent secsleft power_plugged")
Sensor = namedtuple("Sensor", "label current high critical")


@pytest.mark.parametrize(
    ("battery", "percent"), [(None, None), (Battery(17.4, 100, False), 17.4), (Battery(17, -2, True), 100.0)]
)
def test_a_battery_counts_as_full_while_it_is_plugged_in(
    battery: Battery | None, percent: float | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(psutil, "sensors_battery", lambda: battery, raising=False)
    assert battery_percent() == percent


def test_the_hottest_sensor_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    groups = {"cpu": [Sensor("", 51.0, 100, 110), Sensor("", 83.5, 100, 110)], "disk": [Sensor("", 40.0, None, None)]}
    monkeypatch.setattr(psutil, "sensors_temperatures", lambda: groups, raising=False)
    assert highest_temperature() == 83.5
    groups.clear()
    assert highest_temperature() is None


def test_systems_without_sensors_tell_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("sensors_battery", "sensors_temperatures"):
        monkeypatch.delattr(psutil, name, raising=False)
    assert (battery_percent(), highest_temperature()) == (None, None)


def test_without_psutil_it_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "psutil", None)
    with pytest.raises(MissingDependencyError, match=r"edgetune\[sensors\]"):
        battery_percent()
