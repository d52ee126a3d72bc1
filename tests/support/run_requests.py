"""What a run asks of planning, for tests that hand planning a configuration."""

from __future__ import annotations

from edgetune.config import TrainConfig
from edgetune.devices.place import Place
from edgetune.devices.profile import Profile
from edgetune.planning.options import resolve
from edgetune.planning.run import RunRequest

ELSEWHERE = Place(here=False)
"""Some other machine: what is installed on this one does not count."""


def request_of(config: TrainConfig, profile: Profile | None = None, *, here: bool = True) -> RunRequest:
    """The request of a run at a place."""
    return resolve(config, Place(profile, here)).request
