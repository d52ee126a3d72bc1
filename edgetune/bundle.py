"""A bundle on disk: opening it verifies every byte, sealing it writes the manifest."""

from __future__ import annotations

import stat
from dataclasses import dataclass
from pathlib import Path

from edgetune.errors import UsageError, VerificationError
from edgetune.manifest import BundleManifest, File, read_manifest, write_manifest
from edgetune.storage import sha256_of, write_file

MANIFEST = "manifest.json"


@dataclass(frozen=True)
class Bundle:
    """A verified bundle."""

    path: Path
    manifest: BundleManifest

    def file(self, role: str) -> Path:
        """Path of the graph that plays `role`: `step`, `loss`, `adamw`, `training_model` and so on."""
        return self.path / self.manifest.graph(role).file


def open_bundle(path: Path) -> Bundle:
    """Open a bundle and verify it.

    Raises:
        UsageError: There is no bundle at `path`.
        IncompatibleError: A format or version that this edgetune does not read.
        VerificationError: A file is missing, changed, or not a regular file.
    """
    if not (path / MANIFEST).is_file():
        raise UsageError(
            f"{path}: no bundle here (no {MANIFEST}); make one with `edgetune prepare CHECKPOINT --output {path}`"
        )
    manifest = read_manifest((path / MANIFEST).read_bytes(), BundleManifest, str(path / MANIFEST))
    verify_files(path, manifest.files)
    return Bundle(path, manifest)


def verify_files(folder: Path, files: list[File]) -> None:
    """Check every listed file: inside the folder, regular, of the right size and hash; report all that fail.

    Raises:
        VerificationError: Naming each file that fails, what was expected and what was found.
    """
    problems = []
    for entry in files:
        relative = Path(entry.path)
        if relative.is_absolute() or ".." in relative.parts:
            problems.append(f"{entry.path!r} leads out of {folder}")
            continue
        path = folder / relative
        try:
            status = path.lstat()
        except FileNotFoundError:
            problems.append(f"{path} is missing")
            continue
        if not stat.S_ISREG(status.st_mode):
            problems.append(f"{path} is not a regular file")
        elif status.st_size != entry.size:
            problems.append(f"{path} has {status.st_size:,} bytes, its manifest says {entry.size:,}")
        elif (found := sha256_of(path)) != entry.sha256:
            problems.append(f"{path} was changed: SHA-256 is {found[:16]}…, its manifest says {entry.sha256[:16]}…")
    if problems:
        raise VerificationError("\n".join([*problems, f"copy {folder} again from its source, or make it anew"]))


def list_files(folder: Path, *, without: str) -> list[File]:
    """Every file under `folder` but the manifest called `without`, hashed."""
    paths = sorted(
        path for path in folder.rglob("*") if path.is_file() and path.relative_to(folder).as_posix() != without
    )
    return [File(path.relative_to(folder).as_posix(), path.stat().st_size, sha256_of(path)) for path in paths]


def seal_bundle(folder: Path, manifest: BundleManifest) -> None:
    """Write the manifest of a folder whose files are complete."""
    write_file(folder / MANIFEST, write_manifest(manifest))
