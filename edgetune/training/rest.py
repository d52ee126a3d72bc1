"""A run rests while the battery is low or the machine is hot, and then goes on."""

from __future__ import annotations

from collections.abc import Callable
from time import sleep

from edgetune.machine.sensors import battery_percent, highest_temperature

_POLL_SECONDS = 5.0
"""Between two looks while the run rests: as long as a signal may wait then."""
_COOLER = 5.0
"""Degrees Celsius below its limit at which the run goes on: at the limit it would rest again at once."""


class Rest:
    """Looks at the sensors between two steps.

    Args:
        least_battery: Percent below which the run rests; none where the battery does not matter.
        most_temperature: Degrees Celsius above which it rests; none where that does not matter.
        say: Hears that it rests and goes on, and that the system does not tell what it was asked for.

    Raises:
        MissingDependencyError: One of them matters, and psutil is not installed.
    """

    def __init__(
        self, least_battery: float | None, most_temperature: float | None, say: Callable[[str], None]
    ) -> None:
        self._least_battery, self._most_temperature, self._say = least_battery, most_temperature, say
        if least_battery is not None and battery_percent() is None:
            say("this system tells no battery level: --pause-below-battery changes nothing")
            self._least_battery = None
        if most_temperature is not None and highest_temperature() is None:
            say("this system tells no temperature: --pause-above-temperature changes nothing")
            self._most_temperature = None

    def reason(self, cooler: float = 0.0) -> str:
        """Why the run should rest now; empty where it should not.

        Args:
            cooler: Degrees by which the temperature has to be below its limit.
        """
        battery = None if self._least_battery is None else battery_percent()
        if self._least_battery is not None and battery is not None and battery < self._least_battery:
            return f"the battery is at {battery:.0f} %, below {self._least_battery:g} %"
        most = None if self._most_temperature is None else self._most_temperature - cooler
        degrees = None if most is None else highest_temperature()
        if most is not None and degrees is not None and degrees > most:
            return f"the machine is at {degrees:.0f} °C, above {most:g} °C"
        return ""

    def take(self, before: Callable[[], object], look: Callable[[], None]) -> None:
        """Rest as long as there is a reason.

        Args:
            before: Called once before the run rests, to save its state.
            look: Called again and again meanwhile; what it raises ends the run.
        """
        if not (reason := self.reason()):
            return
        before()
        self._say(f"the run rests: {reason}")
        while self.reason(_COOLER):
            sleep(_POLL_SECONDS)
            look()
        self._say("the run goes on")
