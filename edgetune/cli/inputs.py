"""What commands are pointed at: checked before anything is loaded, and named when it is the wrong thing."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import combinations
from pathlib import Path
from typing import TYPE_CHECKING

import click

from edgetune.data.source import refuse_shared, require_source
from edgetune.errors import UsageError

if TYPE_CHECKING:
    from edgetune.describe import Kind
    from edgetune.formats.bundle import Bundle

PATH = click.Path(path_type=Path)

_ORIGINS: dict[str, str] = {
    "bundle": "make one with `edgetune prepare CHECKPOINT --output BUNDLE`",
    "adapter": "make one with `edgetune train BUNDLE --data FILE --output ADAPTER`",
    "model": "make one with `edgetune export BUNDLE --adapter ADAPTER --output MODEL`",
}
"""Where each kind of folder comes from."""


def row_sources(sources: Mapping[str, Path | None]) -> None:
    """See that the rows of a command can be read: from files, or from pipes that differ.

    Args:
        sources: What each option names; `-` is standard input.

    Raises:
        UsageError: Rows cannot be read there, a name is not valid Unicode, or two options name one pipe; the message
            names the options.
    """
    from edgetune.formats.storage import require_unicode

    given = {option: path for option, path in sources.items() if path is not None}
    for option, path in given.items():
        require_unicode(path)
        require_source(path, option)
    for (first, one), (second, two) in combinations(given.items(), 2):
        refuse_shared(one, two, f"{first} and {second}")


def input_file(path: Path, option: str, expected: str) -> Path:
    """A file that an option names.

    Raises:
        UsageError: It is missing, a folder, or of a name that is not valid Unicode; the message names `option`.
    """
    from edgetune.formats.storage import require_unicode

    require_unicode(path)
    if path.is_dir():
        raise UsageError(f"{option} {path} is a folder; expected {expected}")
    if not path.exists():
        raise UsageError(f"{option} {path}: no such file")
    return path


def bundle_folder(path: Path) -> Path:
    """A bundle's folder, for a stage that opens it.

    Raises:
        UsageError: There is something else, or nothing.
    """
    return _folder(path, "bundle")


def bundle_at(path: Path) -> Bundle:
    """Open and verify a bundle.

    Raises:
        UsageError: There is something else, or nothing.
        IncompatibleError: A format or version that this edgetune does not read.
        VerificationError: A file is missing or changed.
    """
    from edgetune.formats.bundle import load_bundle

    return load_bundle(bundle_folder(path))


def adapter_at(path: Path) -> Path:
    """An adapter folder; what is in it, the stages check.

    Raises:
        UsageError: There is something else, or nothing.
    """
    return _folder(path, "adapter")


def adapter_source(path: Path) -> Path:
    """Where another tool may have left an adapter: a folder or a file; what is in it, the stages look for.

    Raises:
        UsageError: There is nothing, or another folder of edgetune's.
    """
    return _folder(path, "adapter", "folder", "file", "checkpoint", "image")


def model_at(path: Path) -> Path:
    """A GenAI model folder; a bundle is one as well.

    Raises:
        UsageError: There is something else, or nothing.
    """
    return _folder(path, "model", "bundle")


def _folder(path: Path, wanted: Kind, *also: Kind) -> Path:
    from edgetune.describe import KIND_NAMES, kind_of

    found = kind_of(path)
    if found not in (wanted, *also):
        raise UsageError(f"{path} is {KIND_NAMES[found]}; expected {KIND_NAMES[wanted]}: {_ORIGINS[wanted]}")
    return path


def refuse_known_folder(path: Path) -> None:
    """Refuse a folder that edgetune itself has made, where a checkpoint is expected.

    Raises:
        UsageError: It is a bundle, an adapter or a model.
    """
    from edgetune.describe import KIND_NAMES, kind_of

    found = kind_of(path)
    if found in _ORIGINS:
        expected = f"{KIND_NAMES['checkpoint']} (config.json, *.safetensors)"
        raise UsageError(f"{path} is {KIND_NAMES[found]}; expected {expected}")
