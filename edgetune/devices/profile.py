"""Device profiles: what a board, phone or computer has, and what may run where on it.

A profile is a TOML file, data only. Those of edgetune are in `devices/`; anybody can write one, and give its path.
Every figure says where it is from; what has no source is left out. The format is described in `docs/devices.md`.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, get_args

from edgetune.config import DeviceType, RuntimeName
from edgetune.devices.profile_file import read_as
from edgetune.errors import UsageError
from edgetune.text.suggestion import did_you_mean

Kind = Literal["cpu", "npu", "fpga"]
Architecture = Literal["x86_64", "aarch64"]
System = Literal["linux", "windows", "macos", "android"]
Precision = Literal["fp32", "bf16", "fp16", "int8"]
Where = Literal["accelerator", "cpu", "no"]

SUFFIX = ".toml"
_OPTIONS = ("soc_model", "device_type")
"""Of providers, those that edgetune reads."""
_NAME = re.compile(r"[a-z0-9]+(-[a-z0-9]+)*")


@dataclass(frozen=True)
class Count:
    """A number of things."""

    value: int
    source: str
    """Address or document that says so."""


@dataclass(frozen=True)
class Size:
    """Of memory, flash or a file."""

    value: int = field(metadata={"size": True})
    """Bytes; in the file a text such as `8GB`."""
    source: str


@dataclass(frozen=True)
class Speed:
    """Something a second."""

    value: float
    source: str


@dataclass(frozen=True)
class Statement:
    """What the documentation says and no number tells."""

    text: str
    source: str


@dataclass(frozen=True)
class Hardware:
    """What is there, whatever runs on it."""

    architecture: Architecture
    systems: tuple[System, ...]
    """Operating systems that the runtime is made for."""
    cores: Count | None = None
    """Of the CPU."""
    memory: Size | None = None
    """That the CPU and the accelerator share."""
    flash: Size | None = None
    """Of the smallest model; a card or disk that is put in is no part of the device."""
    memory_bandwidth: Speed | None = None
    """Bytes a second, at most."""
    products: Speed | None = None
    """Floating-point operations a second of the CPU in float32 matrix products, at most."""
    known_as: Statement | None = None
    """A regular expression for what the machine says of itself, such as the device tree's model; without one any
    machine of the architecture is meant."""


@dataclass(frozen=True)
class Execution:
    """What executes graphs: the table `[runtime]`."""

    names: tuple[str, ...]
    """Of edgetune runtimes, the preferred first; this edgetune need not have them all."""
    provider: str
    """ONNX Runtime's execution provider that reaches the accelerator."""
    source: str
    options: Mapping[str, str] = field(default_factory=dict)
    """Of the provider."""
    precisions: tuple[Precision, ...] = ()
    """In which products are computed there."""


@dataclass(frozen=True)
class Buckets:
    """The only shapes of a batch, where shapes are fixed when a graph is compiled."""

    shapes: tuple[tuple[int, int], ...]
    """Rows and positions of each, by size."""
    source: str


@dataclass(frozen=True)
class Placement:
    """Where each kind of training, and inference, may run."""

    whole_step: Where
    """Forward and backward as one graph."""
    layered: Where
    """Sublayer by sublayer, weights as inputs."""
    split_trunk: Where
    """The frozen trunk in int8; adapters and gradients on the CPU."""
    forward_only: Where
    """Zeroth-order training: only forward passes."""
    inference: Where
    source: str


@dataclass(frozen=True)
class Limits:
    """What cannot be more."""

    largest_batch: Count | None = None
    longest_row: Count | None = None
    largest_file: Size | None = None
    """Of a model; nothing is compared with it."""
    notes: tuple[Statement, ...] = ()


@dataclass(frozen=True)
class Install:
    """What must be installed for the runtime."""

    step: str
    """A command, or a sentence where there is none."""
    source: str
    packages: tuple[str, ...] = ()
    """Python distributions that are there afterwards."""


@dataclass(frozen=True)
class Profile:
    """A device."""

    name: str
    title: str
    """For people."""
    kind: Kind = field(metadata={"key": "class"})
    vendor: str
    hardware: Hardware
    runtime: Execution
    placement: Placement
    install: Install
    buckets: Buckets | None = None
    limits: Limits = Limits()


def profile_names(folder: Path | None = None) -> list[str]:
    """Names of the profiles in a folder; edgetune's own without one."""
    return sorted(path.stem for path in (folder or _folder()).glob(f"*{SUFFIX}"))


def load_profile(name: str) -> Profile:
    """A profile by its name, or by the path of its file.

    Raises:
        UsageError: There is no such profile, or it is broken: all that is wrong, each with file and line.
    """
    if name.endswith(SUFFIX) or "/" in name or "\\" in name:
        return _load(Path(name), own=False)
    known = profile_names()
    if name not in known:
        raise UsageError(
            f"no device is called {name!r:.60}{did_you_mean(name, known)} (see `edgetune devices list`, or give the "
            "path of a profile such as ./my-board.toml)"
        )
    return _load(_folder() / f"{name}{SUFFIX}", own=True)


def load_profiles(folder: Path | None = None) -> list[Profile]:
    """Every profile of a folder, by name; edgetune's own without one.

    Raises:
        UsageError: Naming all that is wrong in all of them.
    """
    folder = folder or _folder()
    profiles, problems = [], []
    for name in profile_names(folder):
        try:
            profiles.append(_load(folder / f"{name}{SUFFIX}", own=True))
        except UsageError as error:
            problems.append(str(error))
    if problems:
        raise UsageError("\n".join(problems))
    return profiles


def _folder() -> Path:
    """In the wheel the profiles lie in this room, in a checkout beside the package."""
    room = Path(__file__).parent
    return room if any(room.glob("*.toml")) else room.parents[1] / "devices"


def _load(path: Path, *, own: bool) -> Profile:
    file, profile, problems = read_as(path, Profile)
    if profile is not None:
        problems += [f"{file.line(*keys)}: {text}" for keys, text in _contradictions(profile)]
        if own and profile.name != path.stem:
            # So that no two profiles of a folder have one name.
            problems.append(f"{file.line('name')}: name is {profile.name!r:.60}, but the file is {path.name}")
    if profile is None or problems:
        raise UsageError("\n".join(problems))
    return profile


def _contradictions(profile: Profile) -> Iterator[tuple[tuple[str, ...], str]]:
    """What the types do not tell: the key, and what is wrong with it."""
    if not _NAME.fullmatch(profile.name):
        yield ("name",), f"name is {profile.name!r:.60}, expected lower-case letters and digits with dashes between"
    yield from _impossible_execution(profile.runtime)
    if not profile.hardware.systems:
        yield ("hardware", "systems"), f"systems is empty, expected one of {', '.join(get_args(System))} at least"
    placement = profile.placement
    runs = ("whole_step", "layered", "split_trunk", "forward_only", "inference")
    on_accelerator = [run for run in runs if getattr(placement, run) == "accelerator"]
    if profile.kind == "cpu" and on_accelerator:
        key = on_accelerator[0].replace("_", "-")
        yield ("placement", key), f"{key} is 'accelerator', but a device of class cpu has none"
    if profile.kind != "cpu" and not on_accelerator:
        yield ("placement",), f"nothing runs on the accelerator, but the class is {profile.kind}; expected cpu"
    if all(getattr(placement, run) == "no" for run in runs):
        yield ("placement",), "nothing runs anywhere; expected 'cpu' or 'accelerator' at least once"
    if profile.buckets is not None:
        shapes = profile.buckets.shapes
        if not shapes or any(size < 1 for shape in shapes for size in shape):
            yield ("buckets", "shapes"), "expected at least one [rows, positions], none of them 0"
        elif len(set(shapes)) < len(shapes) or list(shapes) != sorted(shapes, key=lambda each: each[0] * each[1]):
            yield ("buckets", "shapes"), "expected each [rows, positions] once, the smallest product first"
        limit = profile.limits.largest_batch
        if limit is not None and (most := max((rows for rows, _ in shapes), default=0)) > limit.value:
            yield ("buckets", "shapes"), f"a shape has {most} rows, but limits.largest-batch is {limit.value}"
    if (known_as := profile.hardware.known_as) is not None:
        try:
            re.compile(known_as.text)
        except re.error as error:
            yield ("hardware", "known-as"), f"known-as is no regular expression: {error}"


def _impossible_execution(runtime: Execution) -> Iterator[tuple[tuple[str, ...], str]]:
    known = [name for name in get_args(RuntimeName) if name != "auto"]
    if not any(name in known for name in runtime.names):
        found = ", ".join(map(repr, runtime.names)) or "empty"
        yield ("runtime", "names"), f"names is {found}, expected one of {', '.join(known)} at least"
    for name in runtime.names:
        # One that a later edgetune has is none of these, and not nearly one.
        if name not in known and (meant := did_you_mean(name, known)):
            yield ("runtime", "names"), f"names has {name!r:.60}{meant}"
    for option in runtime.options:
        if option not in _OPTIONS and (meant := did_you_mean(option, _OPTIONS)):
            yield ("runtime", "options"), f"options has {option!r:.60}{meant}"
    chip, kind = runtime.options.get("soc_model"), runtime.options.get("device_type")
    if chip is not None and not chip.isdecimal():
        yield ("runtime", "options"), f"soc_model is {chip!r:.60}, expected a number such as 69"
    devices = [device for device in get_args(DeviceType) if device != "auto"]
    if kind is not None and kind not in devices:
        yield ("runtime", "options"), f"device_type is {kind!r:.60}, expected {', '.join(devices)}"
