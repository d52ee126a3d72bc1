"""`pip install edgetune` alone: small, complete, and without anything of the host."""

from __future__ import annotations

import subprocess
import sys
import time
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

import edgetune

LIMIT_BYTES = 250_000_000
HOST_MODULES = ("torch", "transformers", "optimum", "olive", "peft", "onnx", "onnx_ir", "onnxscript", "pandas", "scipy")


def needed_by(name: str) -> set[str]:
    """edgetune and all that it needs, through any number of steps: what pip brings to a device."""
    found: set[str] = set()
    open_names = [canonicalize_name(name)]
    while open_names:
        current = open_names.pop()
        if current in found:
            continue
        found.add(current)
        for requirement in map(Requirement, metadata.requires(current) or []):
            if requirement.marker is None or requirement.marker.evaluate({"extra": ""}):
                open_names.append(canonicalize_name(requirement.name))
    return found


def size_of(name: str) -> int:
    """Bytes of a distribution's files on the disk."""
    paths = [Path(str(file.locate())) for file in metadata.files(name) or []]
    return sum(path.stat().st_size for path in paths if path.is_file())


def test_the_installed_package_is_tested_and_not_the_checkout() -> None:
    assert "site-packages" in Path(edgetune.__file__).parts


def test_everything_together_is_below_the_limit() -> None:
    sizes = {name: size_of(name) for name in needed_by("edgetune")}
    assert {"onnxruntime", "onnxruntime-genai", "numpy"} <= {name for name, size in sizes.items() if size > 1_000_000}
    total = sum(sizes.values())
    print(f"\ndevice install: {total / 1e6:.1f} MB in {len(sizes)} packages")
    assert total < LIMIT_BYTES, sorted(sizes.items(), key=lambda item: -item[1])


@pytest.mark.parametrize("module", HOST_MODULES)
def test_nothing_of_the_host_is_there(module: str) -> None:
    assert find_spec(module) is None


def test_nothing_else_came_along() -> None:
    """What is installed is edgetune's needs, the installer, and pytest's; so the size above leaves nothing out."""
    installed = {canonicalize_name(found.name) for found in metadata.distributions()}
    assert installed - needed_by("edgetune") - needed_by("pytest") - {"pip", "setuptools"} == set()


def test_every_module_that_a_device_uses_can_be_imported() -> None:
    folder = Path(edgetune.__file__).parent
    host = {"preparation", "exporting", "split", "host"}
    assert host <= {room.name for room in folder.iterdir() if room.is_dir()}
    scripts = ("__main__", "launcher", "probe", "worker")
    modules = set()
    for path in folder.rglob("*.py"):
        parts = path.relative_to(folder.parent).with_suffix("").parts
        if not (len(parts) > 1 and parts[1] in host) and not path.stem.endswith(scripts):
            modules.add(".".join(parts[:-1] if parts[-1] == "__init__" else parts))
    # These need the extra of that name.
    needing = (
        "edgetune.runtimes.layered.openvino.",
        "edgetune.runtimes.whole.openvino_compiler",
        *(f"edgetune.runtimes.torch.{module}" for module in ("engines", "network", "processes", "session", "worker")),
    )
    modules = {name for name in modules if not name.startswith(needing)}
    assert len(modules) > 30
    code = f"import importlib; [importlib.import_module(name) for name in {sorted(modules)!r}]"
    done = subprocess.run([sys.executable, "-I", "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_help_takes_less_than_0_3_seconds() -> None:
    command = [str(Path(sys.executable).with_name("edgetune")), "--help"]
    seconds = []
    for _ in range(5):
        start = time.perf_counter()
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        seconds.append(time.perf_counter() - start)
    assert "prepare" in done.stdout
    assert min(seconds) < 0.3


def test_doctor_says_what_prepare_would_need() -> None:
    from edgetune.doctor import examine

    findings = examine()
    device = [finding for finding in findings if finding.group == "device"]
    assert len(device) > 5
    assert [finding for finding in device if not finding.ok] == []
    missing = {finding.name: finding.fix for finding in findings if finding.group == "host" and finding.found is None}
    assert {"torch", "transformers", "optimum", "olive-ai", "onnx"} <= set(missing)
    assert set(missing.values()) == {'pip install "edgetune[host]"'}
