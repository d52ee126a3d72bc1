"""What is installed, what is missing, and how to get it. Reads package metadata; imports none of the packages."""

from __future__ import annotations

import os
import platform
import shutil
from collections.abc import Iterator
from dataclasses import dataclass, replace
from importlib import metadata
from pathlib import Path
from typing import Literal

from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet

from edgetune.errors import MissingDependencyError
from edgetune.machine.cache_folder import cache_folder
from edgetune.machine.memory import free_memory_bytes
from edgetune.machine.threads import usable_processors
from edgetune.side_environment import REQUIREMENTS, base_interpreter, side_environment_version

Group = Literal["device", "host", "extras", "side environment", "machine"]

_PACKAGE = "edgetune"
_EXTRAS = {
    "openvino": "train --runtime openvino, the fastest on Intel CPUs with bfloat16",
    "qnn": "train --runtime qnn, on Qualcomm's NPU or, on x86-64 Linux, its emulation",
    "openvino-ep": "train --runtime openvino-ep, the same through ONNX Runtime, on Intel's devices",
    "data": "data convert of Parquet files",
    "eval": "eval --generate with the metrics bleu, chrf and macro-f1",
    "tensorboard": "train --log-to tensorboard",
    "mlflow": "train --log-to mlflow",
    "torch": "train --runtime torch, on hosts with GPUs or without",
    "deepspeed": "train --runtime torch --sharding zero1, zero2 or zero3",
    "fpga": "train --runtime fpga-hls, an FPGA emulation, which needs g++ as well; ship --target fpga",
}
"""Extras that nothing needs, and what they are for."""
_TRAINING = "onnxruntime-training-cpu"
_CPU_FEATURES = (
    *("avx2", "fma", "f16c", "avx512f", "avx512_vnni", "avx512_bf16", "avx_vnni", "amx_int8", "amx_bf16"),  # x86-64
    *("asimd", "asimdhp", "asimddp", "i8mm", "bf16", "sve"),  # Arm
)
"""Instruction sets that ONNX Runtime's kernels pick their speed by, as Linux names them."""


@dataclass(frozen=True)
class Finding:
    """One thing that edgetune needs or that tells what it can do here."""

    group: Group
    name: str
    found: str | None
    """Version or fact; None when it is missing or cannot be told."""
    wanted: str
    """Version range, empty where any will do."""
    needed_for: str
    ok: bool
    """Whether what was found does for what it is needed for."""
    fix: str | None
    """How to get it; None when nothing needs to be done."""


def examine() -> list[Finding]:
    """Look at packages, the side environment and the machine, in the order of the groups.

    The wanted versions are those of edgetune's own package metadata.

    Raises:
        MissingDependencyError: edgetune itself is not installed, so that there is no metadata to compare with.
    """
    return [*_packages(), *_clashes(), _side_environment(), *_machine()]


def _packages() -> Iterator[Finding]:
    try:
        lines = metadata.requires(_PACKAGE) or []
    except metadata.PackageNotFoundError:
        raise MissingDependencyError(
            "edgetune runs from its sources without being installed; run `pip install -e .` in their folder"
        ) from None
    device: list[Finding] = []
    host: list[Finding] = []
    extras: list[Finding] = []
    for requirement in map(Requirement, lines):
        if requirement.marker is None or requirement.marker.evaluate({"extra": ""}):
            device.append(_package(requirement, "device", f'pip install "{requirement.name}{requirement.specifier}"'))
        elif requirement.marker.evaluate({"extra": "host"}):
            host.append(_package(requirement, "host", 'pip install "edgetune[host]"'))
        else:
            named = (name for name in _EXTRAS if requirement.marker.evaluate({"extra": name}))
            extras += [_extra(requirement, name) for name in named]
    yield from device
    yield from host
    yield from extras


def _extra(requirement: Requirement, name: str) -> Finding:
    """Whoever has it should have the right version; nobody has to have it."""
    install = f'pip install "edgetune[{name}]"'
    finding = _package(requirement, "extras", install)
    absent = finding.found is None
    fix = f"{install}: {_EXTRAS[name]}" if absent else finding.fix
    return replace(finding, needed_for=_EXTRAS[name], ok=finding.ok or absent, fix=fix)


def _package(requirement: Requirement, group: Group, fix: str) -> Finding:
    try:
        found = metadata.version(requirement.name)
    except metadata.PackageNotFoundError:
        found = None
    ok = found is not None and requirement.specifier.contains(found, prereleases=True)
    purpose = "train, eval, generate" if group == "device" else "prepare, export"
    return Finding(group, requirement.name, found, _readable(requirement.specifier), purpose, ok, None if ok else fix)


def _readable(specifier: SpecifierSet) -> str:
    """`>=2.1,<3`, lower bound first."""
    return ",".join(sorted(map(str, specifier), key=lambda part: part.startswith("<")))


def _clashes() -> Iterator[Finding]:
    """Several packages that install the module `onnxruntime` overwrite each other's files."""
    providers = sorted(set(metadata.packages_distributions().get("onnxruntime", [])))
    if len(providers) > 1:
        names = " ".join(providers)
        fix = f"pip uninstall {names}, then pip install onnxruntime (ONNX Runtime Training has its own environment)"
        yield Finding("device", "import onnxruntime", names, "one package", "train, eval, generate", False, fix)


def _side_environment() -> Finding:
    pinned = (Requirement(line.split()[0]) for line in REQUIREMENTS.read_text().splitlines() if "==" in line)
    wanted = next(requirement for requirement in pinned if requirement.name == _TRAINING)
    version = side_environment_version()
    fix = None
    if version is None:
        try:
            base_interpreter()
            fix = "nothing to do: the first `edgetune prepare` makes it"
        except MissingDependencyError as error:
            fix = str(error)
    found = version.removeprefix(f"{_TRAINING} ") if version else None
    purpose = "prepare, train --runtime ort-training"
    return Finding("side environment", wanted.name, found, str(wanted.specifier), purpose, found is not None, fix)


def _machine() -> Iterator[Finding]:
    yield _fact("Python", f"{platform.python_implementation()} {platform.python_version()}")
    yield _fact("system", f"{platform.system()} {platform.machine()}")
    yield _fact("processor", _processor())
    yield _fact("cores", str(usable_processors()))
    yield _fact("memory", _memory())
    for name, folder in (("disk, this folder", Path.cwd()), ("disk, cache folder", cache_folder())):
        existing = next(path for path in (folder, *folder.parents) if path.exists())
        yield _fact(name, f"{_gigabytes(shutil.disk_usage(existing).free)} free ({folder})")


def _fact(name: str, found: str | None) -> Finding:
    return Finding("machine", name, found, "", "", True, None)


def _processor() -> str | None:
    fields = _fields(Path("/proc/cpuinfo"))
    flags = (fields.get("flags") or fields.get("Features") or "").split()
    name = fields.get("model name") or platform.processor() or None
    features = " ".join(feature for feature in _CPU_FEATURES if feature in flags)
    return f"{name or 'unknown'} ({features})" if features else name


def _memory() -> str | None:
    fields = _fields(Path("/proc/meminfo"))
    if "MemTotal" in fields and (available := free_memory_bytes()) is not None:
        total = int(fields["MemTotal"].split()[0]) * 1024
        return f"{_gigabytes(total)}, {_gigabytes(available)} available"
    if hasattr(os, "sysconf") and "SC_PHYS_PAGES" in os.sysconf_names:
        return _gigabytes(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"))
    return None


def _fields(path: Path) -> dict[str, str]:
    """`name : value` lines of a /proc file, the first of each name; nothing where there is no such file."""
    fields: dict[str, str] = {}
    if path.is_file():
        for line in path.read_text(errors="replace").splitlines():
            name, _, value = line.partition(":")
            fields.setdefault(name.strip(), value.strip())
    return fields


def _gigabytes(size: int) -> str:
    return f"{size / 1e9:.1f} GB"
