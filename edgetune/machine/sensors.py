"""The battery's level and the temperature, where the system tells them; psutil reads them."""

from __future__ import annotations

from importlib import import_module
from types import ModuleType

from edgetune.errors import MissingDependencyError


def require_psutil() -> ModuleType:
    """The package that reads sensors.

    Raises:
        MissingDependencyError: It is not installed.
    """
    try:
        return import_module("psutil")
    except ModuleNotFoundError:
        raise MissingDependencyError(
            'psutil, which reads the battery and temperatures, is not installed; pip install "edgetune[sensors]"'
        ) from None


def battery_percent() -> float | None:
    """How full the battery is, in percent; 100 while it is plugged in, none where there is none or nothing tells.

    Raises:
        MissingDependencyError: psutil is not installed.
    """
    # psutil lacks the function on systems where it knows no way.
    read = getattr(require_psutil(), "sensors_battery", None)
    battery = None if read is None else read()
    if battery is None:
        return None
    return 100.0 if battery.power_plugged else float(battery.percent)


def highest_temperature() -> float | None:
    """Of all sensors, in degrees Celsius; none where nothing tells.

    Raises:
        MissingDependencyError: psutil is not installed.
    """
    read = getattr(require_psutil(), "sensors_temperatures", None)
    groups = {} if read is None else read()
    return max((float(sensor.current) for group in groups.values() for sensor in group), default=None)
