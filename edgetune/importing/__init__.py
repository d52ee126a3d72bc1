"""`import`: an adapter that another tool trained becomes one of a bundle. Also what `train --init-adapter` begins with.

It takes numpy alone, so that it runs on a device. Nothing is executed, and no pickle is opened.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime
from os import PathLike
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

import edgetune
from edgetune.config import ImportConfig, check_config
from edgetune.formats.adapter import MANIFEST, check_contract, described, most_bytes, row_encoding, write_adapter
from edgetune.formats.bundle import Bundle, as_bundle
from edgetune.formats.manifest import RowEncoding
from edgetune.formats.row_norms import read_row_norms
from edgetune.formats.storage import atomic_folder, sha256_of
from edgetune.importing.reshape import reshape
from edgetune.importing.sources import opened
from edgetune.importing.updates import read_updates
from edgetune.model.lora import require_slots
from edgetune.text.pulse import silent


@dataclass(frozen=True)
class ForeignAdapter:
    """An adapter of another tool, or of another bundle of the same base, in a bundle's slots."""

    tool: str
    """Who wrote it: `PEFT`, `mlx-lm` or `edgetune`."""
    parameters: dict[str, NDArray[np.float32]]
    """All that the bundle's `Lora.shapes` lists; slots without an update have a B of zeros."""
    filled: list[str]
    """Names of the slots that have an update."""
    untouched: list[str]
    """What of the bundle's slots stays as the base is, in words."""
    rounded: list[str]
    """Names of the slots whose B is rounded."""
    sha256: str
    """Of the file with its tensors."""
    encoding: RowEncoding
    """How its rows were encoded, where it says so."""
    notices: list[str]
    """What is to be said of it."""


@dataclass(frozen=True)
class ImportReport:
    """What `edgetune import` wrote, and what it made it of."""

    path: Path
    tool: str
    """Who wrote the source: `PEFT`, `mlx-lm` or `edgetune`."""
    filled: list[str]
    """Names of the slots that have an update."""
    slots: int
    """How many the bundle has."""
    untouched: list[str]
    """What of them stays as the base is, in words."""
    rounded: list[str]
    """Names of the slots whose B is rounded; all others add the same to the base as the source, to the bit."""
    bytes: int
    """Of all files."""


def import_adapter(
    source: str | PathLike[str],
    bundle: Bundle | str | PathLike[str],
    output: str | PathLike[str],
    config: ImportConfig = ImportConfig(),
    *,
    say: Callable[[str], None] = silent,
) -> ImportReport:
    """Re-shape an adapter that another tool trained into the slots of a bundle, and write it as `train` does.

    Args:
        source: The folder that PEFT, mlx-lm, Azure ML or Kaito left, or one above it; a tar archive of one; a
            container image as an OCI layout or as an archive.
        bundle: What `prepare` made: its path, or what `load_bundle` gave.
        output: The adapter folder to make.
        config: Whether an adapter that is there is replaced.
        say: Called with one line of text for each thing that is to be said.

    Returns:
        What was written, and what it was made of.

    Raises:
        UsageError: A path is not there, holds no adapter or several; or `output` is there already.
        IncompatibleError: The bundle's slots cannot hold it; names all that is in the way, and what would.
        VerificationError: A file is broken, was changed, or could do harm.
        NoRoomError: The disk has no room for the adapter.
        LockedError: Another process writes `output`.
    """
    check_config(config)
    into, made = as_bundle(bundle), Path(output)
    manifest = into.manifest
    needed = sum(most_bytes(manifest.lora).values())
    with atomic_folder(made, replace=config.force, marker=MANIFEST, needed=needed) as folder:
        foreign = read_foreign(Path(source), into)
        for line in foreign.notices:
            say(line)
        written = write_adapter(
            folder,
            base=manifest.base,
            tokenizer=manifest.tokenizer,
            lora=manifest.lora,
            parameters=foreign.parameters,
            provenance={
                "edgetune": edgetune.__version__,
                "imported_from": Path(source).resolve().name,
                "imported_from_sha256": foreign.sha256,
                "made_by": foreign.tool,
                "bundle": manifest.manifest_sha256,
                "finished": datetime.now(UTC).isoformat(timespec="seconds"),
            },
            encoding=foreign.encoding,
        )
    size = sum(file.size for file in written.files) + (made / MANIFEST).stat().st_size
    slots = len(manifest.lora.slots)
    return ImportReport(made, foreign.tool, foreign.filled, slots, foreign.untouched, foreign.rounded, size)


def read_foreign(source: Path, bundle: Bundle) -> ForeignAdapter:
    """Read an adapter wherever another tool left it, into the slots of a bundle.

    Args:
        source: As of `import_adapter`. An adapter of edgetune's is taken as well, of any bundle of the same base.
        bundle: Whose slots.

    Raises:
        EdgetuneError: As `import_adapter` does.
    """
    manifest = bundle.manifest
    lora, base = manifest.lora, manifest.base
    require_slots(lora)
    with opened(source) as found:
        if found.contract is not None:
            check_contract(found.contract, base, manifest.tokenizer)
        updates = read_updates(found)
        title = f"{found.shown} does not fit a bundle of {base.name} with {described(lora)}:"
        made = reshape(updates, lora, manifest.architecture, read_row_norms(bundle), title)
        sha256 = sha256_of(updates.of[0].weights)
        encoding = RowEncoding() if found.contract is None else row_encoding(found.contract)
    notices = []
    if found.contract is None and updates.base and _last(updates.base) != _last(base.name):
        notices.append(f"{found.shown} says that it was trained on {updates.base:.200}; the bundle holds {base.name}")
    if made.rounded:
        scaling = next(iter(made.rounded.values()))
        notices.append(
            f"B of {len(made.rounded)} slots is rounded to float32, because the scaling {scaling:g} is no power of two "
            "times the bundle's; a bundle of that scaling (prepare --alpha) takes every bit"
        )
    if made.untouched:
        notices.append(f"untouched by the adapter: {', '.join(made.untouched)}")
    tool = updates.tool if found.contract is None else "edgetune"
    return ForeignAdapter(
        tool, made.parameters, made.filled, made.untouched, list(made.rounded), sha256, encoding, notices
    )


def _last(name: str) -> str:
    """The last part of a hub id or a path, which people leave alone."""
    return name.replace("\\", "/").rstrip("/").rpartition("/")[2].casefold()
