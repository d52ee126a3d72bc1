"""The rows that an adapter's training was validated on, which an export measures on again."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path, PurePath

from edgetune.formats.adapter import MANIFEST, VALIDATION_DATA, VALIDATION_GIVEN, VALIDATION_SHA256
from edgetune.formats.bundle import load_manifest
from edgetune.formats.manifest import AdapterManifest
from edgetune.formats.storage import sha256_of


def validation_rows_of(adapter: Path, say: Callable[[str], None]) -> Path | None:
    """The rows, where they lie unchanged as seen from the adapter or from the current folder.

    An adapter may come from anywhere: no file is looked at outside of the folder that holds it and the current one.

    Args:
        adapter: The adapter's folder.
        say: Called with a line of text where the adapter tells of rows that are not found.

    Raises:
        VerificationError: The adapter's manifest is broken.
    """
    source = adapter / MANIFEST
    if not source.is_file():
        return None
    provenance = load_manifest(source, AdapterManifest).provenance
    if VALIDATION_DATA not in provenance:
        return None
    for rows in _places(provenance, adapter.resolve().parent, Path.cwd()):
        if rows.is_file() and sha256_of(rows) == provenance.get(VALIDATION_SHA256):
            return rows
    name = PurePath(provenance[VALIDATION_DATA]).name
    say(f"the validation rows {name} are neither beside the adapter nor here, unchanged; --valid names them")
    return None


def _places(provenance: Mapping[str, str], beside: Path, here: Path) -> Iterator[Path]:
    for key, folder in ((VALIDATION_DATA, beside), (VALIDATION_GIVEN, here), (VALIDATION_DATA, here)):
        told = PurePath(provenance.get(key, provenance[VALIDATION_DATA]))
        place = Path(os.path.normpath(folder / told))
        if place.is_relative_to(beside) or place.is_relative_to(here):
            yield place
        yield folder / told.name
