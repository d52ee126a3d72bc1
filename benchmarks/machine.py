"""What the figures were measured on."""

from __future__ import annotations

import os
import platform
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

PACKAGES = ("edgetune", "onnxruntime", "openvino", "torch", "transformers", "peft", "numpy")
"""Whose versions matter for the figures."""
_TELLING_FLAGS = ("avx2", "avx512", "avx_vnni", "amx", "asimddp", "i8mm", "bf16", "sve")
"""Beginnings of the processor flags that decide about matrix products."""


@dataclass(frozen=True)
class Machine:
    """Processor, memory and software."""

    processor: str
    cores: int
    """That this process may use."""
    flags: list[str]
    """Of the processor, those that matter for matrix products."""
    memory: int
    """Bytes."""
    system: str
    python: str
    packages: dict[str, str]
    """Versions of what is installed."""


def describe_machine() -> Machine:
    """This machine."""
    fields = _first_fields(Path("/proc/cpuinfo"))
    flags = (fields.get("flags") or fields.get("Features") or "").split()
    return Machine(
        processor=fields.get("model name") or platform.processor() or platform.machine(),
        cores=len(os.sched_getaffinity(0)),
        flags=sorted(flag for flag in flags if flag.startswith(_TELLING_FLAGS)),
        memory=_total_memory(),
        system=f"{platform.system()} {platform.release()} {platform.machine()}",
        python=platform.python_version(),
        packages={name: found for name in PACKAGES if (found := _version(name))},
    )


def available_memory() -> int:
    """Bytes that processes can still get."""
    return int(_first_fields(Path("/proc/meminfo"))["MemAvailable"].split()[0]) * 1024


def _total_memory() -> int:
    return int(_first_fields(Path("/proc/meminfo"))["MemTotal"].split()[0]) * 1024


def _first_fields(path: Path) -> dict[str, str]:
    """`name : value` lines; of several processors the first."""
    fields: dict[str, str] = {}
    for line in path.read_text().splitlines():
        name, _, value = line.partition(":")
        fields.setdefault(name.strip(), value.strip())
    return fields


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None
