"""Where another tool left an adapter: a folder, one somewhere below it, an archive, or a container image.

What the tools leave, as far as it was seen or read:

    PEFT, Azure ML, AI Toolkit  a folder with adapter_config.json and adapter_model.safetensors, often some levels down
    Kaito                       the same in a volume, or in an image below /data
    mlx-lm                      a folder with adapter_config.json and adapters.safetensors
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator, Set
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from edgetune.errors import UsageError, VerificationError
from edgetune.formats.adapter import CONFIG, MANIFEST, MLX_WEIGHTS, WEIGHTS
from edgetune.formats.storage import recover, require_unicode
from edgetune.importing.archive import Files, Scratch
from edgetune.importing.image import DOCKER_MANIFEST, OCI_MARK, files_of_image, is_part_of_image

_PICKLES = ("adapter_model.bin", "adapter_model.pt", "pytorch_model.bin")
_MLX_ARCHIVE = "adapters.npz"
_MODELS = ("model.safetensors", "model.safetensors.index.json")
_READ = frozenset({CONFIG, WEIGHTS, MLX_WEIGHTS, MANIFEST})
_KNOWN = _READ | {*_PICKLES, _MLX_ARCHIVE, *_MODELS}
_DEEPEST = 8
"""Levels of folders that are looked into."""
_MOST_ENTRIES = 100_000
"""Files and folders that are looked at."""
_SHOWN = 5


@dataclass(frozen=True)
class Source:
    """The files of one adapter, wherever they lay."""

    shown: str
    """How messages call the place."""
    config: Path
    weights: Path | None
    """PEFT's tensors, where there are any."""
    mlx_weights: Path | None
    """Those of mlx-lm."""
    contract: Path | None
    """The folder, where it has a contract of edgetune's as well."""


@contextmanager
def opened(path: Path) -> Iterator[Source]:
    """Find the adapter at or below a path; what has to be unpacked is gone afterwards.

    Args:
        path: A folder, a tar archive, or an image as a folder or an archive.

    Raises:
        UsageError: There is nothing, no adapter, or several.
        VerificationError: An archive or image is broken or leads out of itself, or there are no tensors that can be
            read without running code.
    """
    require_unicode(path)
    recover(path)
    if not path.exists():
        raise UsageError(f"{path}: no such file or folder; expected an adapter of PEFT, mlx-lm, Azure ML or Kaito")
    with tempfile.TemporaryDirectory(prefix="edgetune-import-") as folder:
        scratch = Scratch(Path(folder))
        try:
            yield _source(_files(path, scratch), str(path))
        except VerificationError as error:
            # The files that it names will be gone.
            raise VerificationError(scratch.explained(str(error))) from error


def _files(path: Path, scratch: Scratch) -> Files:
    """What may belong to an adapter, by its path in the folder, archive or image."""
    is_folder, shown = path.is_dir(), str(path)
    if is_folder:
        found = _walk(path)
        is_image = OCI_MARK in found
    else:
        if not path.is_file():
            raise UsageError(f"{path}: is neither a folder nor a regular file; give the adapter's folder or archive")
        if path.suffix == ".safetensors":
            raise UsageError(f"{path}: is one file of an adapter; give the folder that it lies in, with its {CONFIG}")
        found = scratch.unpack(path, shown, lambda name: _is_read(name) or is_part_of_image(name))
        is_image = OCI_MARK in found or DOCKER_MANIFEST in found
    return files_of_image(found, scratch, shown, _is_read) if is_image else found


def _is_read(name: str) -> bool:
    return name.rpartition("/")[2] in _READ


def _walk(root: Path) -> Files:
    """The files of an adapter or an image below a folder, without following links to folders."""
    is_image = (root / OCI_MARK).is_file()
    found: dict[str, Path | None] = {}
    count = 0
    for place, folders, names in os.walk(root):
        folder = Path(place)
        parent = folder.relative_to(root)
        count += len(folders) + len(names)
        if count > _MOST_ENTRIES:
            raise UsageError(f"{root}: has more than {_MOST_ENTRIES:,} files; give the adapter's own folder")
        folders[:] = sorted(folders) if len(parent.parts) < _DEEPEST else []
        for name in names:
            inside = (parent / name).as_posix()
            if name in _KNOWN or (is_image and is_part_of_image(inside)):
                # A hub's cache has links in the place of files.
                found[inside] = folder / name if (folder / name).is_file() else None
    return found


def _source(files: Files, shown: str) -> Source:
    """The adapter among some files: the one that lies least deep."""
    folders = [name.rpartition("/")[0] for name in files if name.rpartition("/")[2] == CONFIG]
    if not folders:
        raise _nothing(files, shown)
    least = min(_depth(folder) for folder in folders)
    nearest = sorted(folder for folder in folders if _depth(folder) == least)
    if len(nearest) > 1:
        told = ", ".join(nearest[:_SHOWN]) + (f" and {len(nearest) - _SHOWN} more" if len(nearest) > _SHOWN else "")
        raise UsageError(f"{shown}: holds {len(nearest)} adapters: {told}; give one of them")
    inside = nearest[0]
    place = f"{shown}, {inside}" if inside else shown
    here = {name: files[path] for name in _KNOWN if (path := f"{inside}/{name}".removeprefix("/")) in files}
    config, wrong = here[CONFIG], sorted(name for name, path in here.items() if path is None and name in _READ)
    if config is None or wrong:
        raise VerificationError(f"{place}: {', '.join(wrong)}: a link or no regular file; put the file itself there")
    if WEIGHTS not in here and MLX_WEIGHTS not in here:
        raise _unreadable(here.keys(), place)
    contract = here.get(MANIFEST)
    if contract is not None and contract.name != MANIFEST:
        raise UsageError(f"{place}: is an adapter of edgetune in an archive; unpack it and give its folder")
    folder = None if contract is None else contract.parent
    return Source(place, config, here.get(WEIGHTS), here.get(MLX_WEIGHTS), folder)


def _depth(folder: str) -> int:
    return len(folder.split("/")) if folder else 0


def _nothing(files: Files, shown: str) -> UsageError:
    """What is there in the place of an adapter."""
    names = {name.rpartition("/")[2] for name in files}
    if names & {WEIGHTS, MLX_WEIGHTS, _MLX_ARCHIVE, *_PICKLES[:2]}:
        return UsageError(f"{shown}: no {CONFIG} beside the tensors, which says rank and scaling; copy it as well")
    if names & set(_MODELS):
        return UsageError(
            f"{shown}: holds a whole model, no adapter; where it was merged, train again without merging (Azure ML: "
            "merge_lora_weights: false), or prepare a bundle of the model"
        )
    return UsageError(f"{shown}: no adapter here or below (no {CONFIG}); give the folder that PEFT or mlx-lm saved")


def _unreadable(names: Set[str], place: str) -> VerificationError:
    if _MLX_ARCHIVE in names:
        return VerificationError(f"{place}: {_MLX_ARCHIVE} is of an early mlx-lm; save {MLX_WEIGHTS} with a newer one")
    pickled = next((f" ({name} is pickle, which can run code)" for name in _PICKLES if name in names), "")
    advice = "save the adapter with PEFT's save_pretrained(safe_serialization=True)"
    return VerificationError(f"{place}: no {WEIGHTS} or {MLX_WEIGHTS}{pickled}; {advice}")
