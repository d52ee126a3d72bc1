"""Debian's packages without installing any: an apt of its own, with its own lists, that thinks nothing is installed."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Sequence
from pathlib import Path


class NoPackagesError(Exception):
    """This machine cannot get them; the message says why."""


def download(
    folder: Path, packages: Sequence[str], *, architecture: str = "amd64", suite: str | None = None, needed: bool = True
) -> list[Path]:
    """Fetch packages into `folder`.

    Args:
        folder: A new folder.
        packages: Names, `NAME:ARCHITECTURE` for another architecture than this one.
        architecture: Of packages and of all that they need.
        suite: Another release of the distribution than the one that is installed, such as `trixie`.
        needed: Also fetch what they need.

    Raises:
        NoPackagesError: There is no apt, or it does not find them.
    """
    if missing := [tool for tool in ("apt-get", "dpkg-deb") if shutil.which(tool) is None]:
        raise NoPackagesError(f"there is no {' and no '.join(missing)}")
    state, cache = folder / "state", folder / "cache"
    for empty in (state / "lists" / "partial", cache / "archives" / "partial"):
        empty.mkdir(parents=True)
    (state / "status").touch()
    lines = [
        f'APT::Architecture "{architecture}"; APT::Architectures {{ "{architecture}"; "amd64"; }};',
        f'Dir::State "{state}"; Dir::State::status "{state}/status"; Dir::Cache "{cache}";',
        'Debug::NoLocking "true"; APT::Sandbox::User ""; Acquire::Languages "none"; APT::Install-Recommends "false";',
    ]
    if suite is not None:
        site = _apt(["indextargets", "--format", "$(SITE)"], folder).split()[0]
        (folder / "suite.list").write_text(f"deb {site} {suite} main\n")
        lines.append(f'Dir::Etc::SourceList "{folder}/suite.list"; Dir::Etc::SourceParts "-";')
    (folder / "apt.conf").write_text("\n".join(lines) + "\n")
    _apt(["update"], folder)
    _apt(["install", "--yes", "--download-only", *packages] if needed else ["download", *packages], folder)
    return sorted([*(cache / "archives").glob("*.deb"), *folder.glob("*.deb")])


def unpack(package: Path, folder: Path) -> None:
    """Put a package's files under `folder`."""
    subprocess.run(["dpkg-deb", "--extract", str(package), str(folder)], check=True)


def _apt(arguments: list[str], folder: Path) -> str:
    config = folder / "apt.conf"
    environment = os.environ | ({"APT_CONFIG": str(config)} if config.exists() else {})
    done = subprocess.run(
        ["apt-get", "-qq", *arguments], cwd=folder, env=environment, capture_output=True, text=True, check=False
    )
    if done.returncode:
        raise NoPackagesError(f"apt-get {arguments[0]} failed: {' '.join(done.stderr.split())[-300:]}")
    return done.stdout
