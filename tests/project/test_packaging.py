"""What is declared, pinned and shipped fits together."""

from __future__ import annotations

import re
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

import edgetune
from support.repository import ROOT

PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
CONSTRAINTS = {
    "host": ROOT / "requirements" / "host.txt",
    "device": ROOT / "edgetune" / "ship" / "device_requirements.txt",
}


def pins(path: Path) -> dict[str, str]:
    """Name → version of a constraints file, which holds nothing but `name==version`."""
    lines = [line for line in path.read_text().splitlines() if not line.startswith("#")]
    assert all(re.fullmatch(r"[A-Za-z0-9._-]+==[A-Za-z0-9.]+", line) for line in lines), path
    return {canonicalize_name(line.split("==")[0]): line.split("==")[1] for line in lines}


def requirements(*extras: str) -> list[Requirement]:
    lines = [*PROJECT["dependencies"]]
    for extra in extras:
        lines += PROJECT["optional-dependencies"][extra]
    return [Requirement(line) for line in lines]


@pytest.mark.parametrize(
    ("name", "extras"), [("host", ("host", "tensorboard", "mlflow", "bench", "test")), ("device", ())]
)
def test_the_pinned_versions_satisfy_what_is_declared(name: str, extras: tuple[str, ...]) -> None:
    pinned = pins(CONSTRAINTS[name])
    for requirement in requirements(*extras):
        version = pinned[canonicalize_name(requirement.name)]
        assert requirement.specifier.contains(version), f"{requirement} but {version} is pinned"


@pytest.mark.parametrize("version", ["3.16.0", "3.29.0"])
def test_a_filelock_that_empties_a_lock_that_is_held_is_not_allowed(version: str) -> None:
    """The holder's PID is in it. The older of these also takes a lock whose file is gone for one that holds."""
    (filelock,) = (requirement for requirement in requirements() if requirement.name == "filelock")
    assert not filelock.specifier.contains(version)


def test_every_dependency_has_an_upper_bound_or_is_pure_metadata() -> None:
    unbounded = [r.name for r in requirements("host", "bench", "test") if not re.search(r"<|==", str(r.specifier))]
    assert unbounded == ["packaging"]


def test_the_device_pins_hold_none_of_the_host_packages() -> None:
    device, both = ({canonicalize_name(r.name) for r in requirements(*extras)} for extras in ((), ("host",)))
    assert "torch" in both - device
    assert (both - device).isdisjoint(pins(CONSTRAINTS["device"]))


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> zipfile.ZipFile:
    folder = tmp_path_factory.mktemp("wheel")
    command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--wheel-dir", str(folder), str(ROOT)]
    subprocess.run(command, check=True, capture_output=True)
    return zipfile.ZipFile(next(folder.glob("*.whl")))


def test_the_wheel_holds_every_file_of_the_package_and_nothing_else(wheel: zipfile.ZipFile) -> None:
    package = {
        path.relative_to(ROOT).as_posix()
        for path in (ROOT / "edgetune").rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    }
    package |= {f"edgetune/devices/{path.name}" for path in (ROOT / "devices").glob("*.toml")}
    assert {"edgetune/py.typed", "edgetune/side_environment/requirements.txt"} <= package
    assert {"edgetune/devices/generic-x86.toml", "edgetune/devices/generic-arm64.toml"} <= package
    assert {name for name in wheel.namelist() if ".dist-info/" not in name} == package


def test_the_profiles_are_found_where_the_wheel_is_installed(wheel: zipfile.ZipFile, tmp_path: Path) -> None:
    wheel.extractall(tmp_path)
    code = "from edgetune.devices.profile import __file__, load_profiles; print(__file__, len(load_profiles()))"
    command = [sys.executable, "-c", f"import sys; sys.path.insert(0, {str(tmp_path)!r}); {code}"]
    said = subprocess.run(command, check=True, capture_output=True, text=True, cwd=tmp_path).stdout.split()
    there = str(tmp_path / "edgetune" / "devices" / "profile.py")
    assert said == [there, str(len(list((ROOT / "devices").glob("*.toml"))))]


def test_the_wheel_says_what_the_package_says(wheel: zipfile.ZipFile) -> None:
    (name,) = (name for name in wheel.namelist() if name.endswith(".dist-info/METADATA"))
    metadata = wheel.read(name).decode()
    assert f"\nVersion: {edgetune.__version__}\n" in metadata
    assert "\nLicense-Expression: Apache-2.0\n" in metadata
    entry_points = wheel.read(name.replace("METADATA", "entry_points.txt")).decode()
    assert "edgetune = edgetune.cli:main" in entry_points


def test_the_changelog_knows_this_version() -> None:
    assert f"## [{edgetune.__version__}]" in (ROOT / "CHANGELOG.md").read_text()
