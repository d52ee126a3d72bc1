"""Whether this machine is a profile's hardware, and has what runs there."""

from __future__ import annotations

import platform
import re
import sys
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

from edgetune.devices.profile import Architecture, Profile, System
from edgetune.errors import MissingDependencyError
from edgetune.runtimes import RUNTIMES, find_runtime
from edgetune.runtimes.execution import ACCELERATING

_ARCHITECTURES: dict[str, Architecture] = {
    "x86_64": "x86_64",
    "amd64": "x86_64",
    "aarch64": "aarch64",
    "arm64": "aarch64",
}
"""What systems call them, in lower case."""
_SYSTEMS: dict[str, System] = {"linux": "linux", "win32": "windows", "darwin": "macos", "android": "android"}
_NAMES = tuple(
    map(
        Path,
        (
            "/proc/device-tree/model",
            "/sys/devices/soc0/machine",
            "/sys/class/dmi/id/product_name",
        ),
    )
)
"""Where Linux says what a board or computer is."""


@dataclass(frozen=True)
class Machine:
    """What this machine says of itself."""

    architecture: str
    system: str
    names: tuple[str, ...]
    """Board, computer, processor."""


@dataclass(frozen=True)
class Presence:
    """What of a profile is here."""

    name: str
    kind: str
    """`cpu`, `npu` or `fpga`."""
    here: bool
    """Whether this machine is that hardware."""
    why: str
    """What tells."""
    runtimes: list[str]
    """Runtimes that the profile wants and this edgetune has."""
    unknown_runtimes: list[str]
    """Runtimes that the profile wants and this edgetune does not have."""
    packages_missing: list[str]
    provider: str
    provider_found: bool
    """Whether ONNX Runtime here offers the provider, or OpenVINO the device."""
    install: str | None
    """What to do where something is missing or the hardware is elsewhere; none when all is there."""


def check(profile: Profile, machine: Machine | None = None) -> Presence:
    """Look for a profile's hardware, packages and provider.

    Args:
        profile: The device's.
        machine: What to compare it with; this machine when it is not given.
    """
    here, why = _recognised(profile, machine or this_machine())
    runtime = profile.runtime
    missing = [name for name in profile.install.packages if not _installed(name)]
    found = _offered(profile)
    return Presence(
        name=profile.name,
        kind=profile.kind,
        here=here,
        why=why,
        runtimes=[name for name in runtime.names if name in RUNTIMES],
        unknown_runtimes=[name for name in runtime.names if name not in RUNTIMES],
        packages_missing=missing,
        provider=runtime.provider,
        provider_found=found,
        install=None if here and found and not missing else profile.install.step,
    )


def this_machine() -> Machine:
    """This machine."""
    name = platform.machine().lower()
    system = "android" if hasattr(sys, "getandroidapilevel") else sys.platform
    return Machine(_ARCHITECTURES.get(name, name), _SYSTEMS.get(system, system), tuple(_names()))


def _recognised(profile: Profile, machine: Machine) -> tuple[bool, str]:
    hardware = profile.hardware
    if machine.architecture != hardware.architecture:
        return False, f"this machine is {machine.architecture}, the device {hardware.architecture}"
    if machine.system not in hardware.systems:
        return False, f"this system is {machine.system}, the device's {' or '.join(hardware.systems)}"
    if hardware.known_as is None:
        return True, f"{machine.architecture}, {machine.system}"
    for name in machine.names:
        if re.search(hardware.known_as.text, name):
            return True, name
    return False, f"this machine calls itself {', '.join(machine.names) or 'nothing'}"


def _names() -> Iterator[str]:
    for path in _NAMES:
        try:
            # Device trees end with a NUL.
            text = path.read_text(errors="replace").strip("\0\n ")
        except OSError:
            continue
        if text:
            yield text
    seen = set()
    try:
        lines = Path("/proc/cpuinfo").read_text(errors="replace").splitlines()
    except OSError:
        lines = []
    for line in lines:
        key, _, value = line.partition(":")
        if key.strip() in ("model name", "Hardware", "Model") and value.strip() not in seen:
            seen.add(value.strip())
            yield value.strip()
    if platform.processor():
        yield platform.processor()


def _installed(package: str) -> bool:
    try:
        metadata.version(package)
    except metadata.PackageNotFoundError:
        return False
    return True


def _offered(profile: Profile) -> bool:
    """Whether ONNX Runtime offers the profile's provider, a package of its own does, or OpenVINO has the device."""
    import onnxruntime

    wanted = profile.runtime.provider
    if wanted == "OpenVINOExecutionProvider":
        # Once its plugin is registered, ONNX Runtime offers the provider whatever devices there are.
        return any(_has_device(name, profile) for name in profile.runtime.names)
    if wanted == "QNNExecutionProvider" and _installed("onnxruntime-qnn"):
        # A plugin, which a session registers; it is offered by its package.
        return True
    return wanted in onnxruntime.get_available_providers()


def _has_device(name: str, profile: Profile) -> bool:
    """Whether a runtime that has devices of several kinds has the profile's here."""
    if name not in ACCELERATING or len(kinds := ACCELERATING[name].device_types) == 1:
        return False
    with suppress(MissingDependencyError):
        has_device = find_runtime(name).has_device
        return has_device is not None and has_device(profile.runtime.options.get("device_type", kinds[0]))
    return False
