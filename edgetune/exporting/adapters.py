"""The adapters of an export by name, each read and checked, with what its run says of it."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from os import PathLike
from pathlib import Path

from edgetune.errors import UsageError
from edgetune.formats.adapter import WEIGHTS, read_adapter, row_encoding
from edgetune.formats.bundle import Bundle
from edgetune.formats.genai import BASE
from edgetune.formats.manifest import RowEncoding
from edgetune.formats.row_norms import read_row_norms
from edgetune.formats.storage import sha256_of
from edgetune.model.lora import Parameters

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}")
_UNNAMED = "adapter"

AdapterPaths = str | PathLike[str] | Mapping[str, str | PathLike[str]]
"""One adapter's folder, or several by the names that they get."""


@dataclass(frozen=True)
class NamedAdapter:
    """An adapter that fits the bundle."""

    name: str
    path: Path
    parameters: Parameters
    encoding: RowEncoding

    @property
    def sha256(self) -> str:
        """Hash of its matrices' file."""
        return sha256_of(self.path / WEIGHTS)


def read_adapters(bundle: Bundle, adapters: AdapterPaths) -> list[NamedAdapter]:
    """Read adapters, in their order.

    Args:
        bundle: What they were trained on.
        adapters: One folder, whose name is the adapter's, or several by name.

    Raises:
        UsageError: There is no adapter, or a name cannot be a file's.
        IncompatibleError: One does not fit the bundle.
        VerificationError: A file was changed.
    """
    named = dict(adapters) if isinstance(adapters, Mapping) else {name_of(Path(adapters)): adapters}
    if not named:
        raise UsageError("there is no adapter to export; give at least one")
    if wrong := [name for name in named if not _is_name(name)]:
        raise UsageError(
            f"an adapter cannot be named {wrong[0]!r:.60}: expected letters, digits, dots, dashes and underscores, and "
            f"not {BASE}, which stands for no adapter; write name=path"
        )
    folded: dict[str, str] = {}
    for name in named:
        if (other := folded.setdefault(name.casefold(), name)) != name:
            raise UsageError(f"adapters {other} and {name} differ in case alone, so their files may be one; rename one")
    source, norms = bundle.manifest, read_row_norms(bundle)
    return [
        NamedAdapter(
            name,
            Path(path),
            read_adapter(Path(path), source.lora, source.base, source.tokenizer, norms),
            row_encoding(Path(path)),
        )
        for name, path in named.items()
    ]


def name_of(path: Path) -> str:
    """What an adapter is called that is given no name: as its folder, if that can be a name."""
    name = path.resolve().name
    return name if _is_name(name) else _UNNAMED


def _is_name(text: str) -> bool:
    return _NAME.fullmatch(text) is not None and text != BASE
