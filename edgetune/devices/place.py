"""Where a run is to happen."""

from __future__ import annotations

from dataclasses import dataclass

from edgetune.data.buckets import Bucket
from edgetune.devices.presence import check
from edgetune.devices.profile import Profile, load_profile


@dataclass(frozen=True)
class Place:
    """A device, and whether this machine is it."""

    profile: Profile | None = None
    """The device's; none where no device was named, which means this machine."""
    here: bool = True
    """Whether this machine executes the run: what is installed and free here counts."""

    @property
    def name(self) -> str | None:
        """The device's; none where no device was named."""
        return None if self.profile is None else self.profile.name

    def memory_limit(self) -> int | None:
        """Bytes of memory that the device has; none where that is not known."""
        return None if self.profile is None or (size := self.profile.hardware.memory) is None else size.value

    def flash_limit(self) -> int | None:
        """Bytes of flash that the device has; none where that is not known."""
        return None if self.profile is None or (size := self.profile.hardware.flash) is None else size.value

    def cores(self) -> int | None:
        """Cores of the device's CPU; none where that is not known."""
        return None if self.profile is None or (count := self.profile.hardware.cores) is None else count.value

    def longest_row(self) -> int | None:
        """Tokens of the longest row that the device takes; none where any length will do."""
        return None if self.profile is None or (count := self.profile.limits.longest_row) is None else count.value

    def largest_batch(self) -> int | None:
        """Rows of the largest batch that the device takes; none where any number will do."""
        return None if self.profile is None or (count := self.profile.limits.largest_batch) is None else count.value

    def shapes(self) -> list[Bucket]:
        """The only shapes of batches that its accelerator takes, the shortest first; empty where any will do."""
        if self.profile is None or self.profile.buckets is None:
            return []
        return sorted(Bucket(positions, rows) for rows, positions in self.profile.buckets.shapes)


def this_machine(device: str | None) -> Place:
    """This machine, which is held to what a device has where one is named, and need not be that device.

    Raises:
        UsageError: There is no such device.
    """
    return Place(None if device is None else load_profile(device))


def find_place(device: str | None) -> Place:
    """A device, wherever it is; this machine where none is named.

    Raises:
        UsageError: There is no such device.
    """
    if device is None:
        return Place()
    profile = load_profile(device)
    return Place(profile, here=check(profile).here)
