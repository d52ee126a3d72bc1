"""Adapters that answer differently, for one model."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np

from edgetune.formats.adapter import MANIFEST
from edgetune.formats.bundle import Bundle
from edgetune.formats.manifest import AdapterManifest, RowEncoding
from edgetune.formats.manifest_json import read_manifest, write_manifest
from support.tiny_phi3 import parameters, save_adapter


def save_several(folder: Path, source: Bundle) -> dict[str, Path]:
    """Two adapters for conversations, and one that was trained on raw prompts, by their names.

    Args:
        folder: Takes their folders.
        source: A bundle of the variant `grouped-query`.
    """
    first = save_adapter(folder / "first", source)
    half = {name: value * np.float32(0.5) for name, value in parameters("grouped-query").items()}
    second = save_adapter(folder / "second", source, values=half)
    raw = Path(shutil.copytree(second, folder / "raw"))
    contract = read_manifest((raw / MANIFEST).read_bytes(), AdapterManifest, MANIFEST)
    (raw / MANIFEST).write_bytes(write_manifest(replace(contract, encoding=RowEncoding(raw_prompts=True))))
    return {"first": first, "second": second, "raw": raw}
