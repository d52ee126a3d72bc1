"""A checkpoint with the adapter folded in: a Hugging Face folder of the same files, whose slots hold W + scaling · B·A.

A safetensors file is copied with its header, its tensors in their places and types; the weights of slots are computed
on the way, a piece of rows in memory at a time. With DoRA they are g ⊙ (W + scaling · B·A), and the gain is found of
the checkpoint's own weights, as PEFT does.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import numpy as np
from numpy.typing import NDArray

from edgetune.errors import IncompatibleError
from edgetune.formats.bundle import Bundle
from edgetune.formats.git_lfs import refuse_pointers
from edgetune.formats.json_file import read_object
from edgetune.formats.row_norms import read_row_norms
from edgetune.formats.safetensors_file import StoredTensor, as_float32, from_float32, read_header
from edgetune.formats.storage import CHUNK, write_file
from edgetune.host.checkpoint import CONFIG, SIDE_FILES, TOKENIZER, TOKENIZER_CONFIG, Checkpoint, open_checkpoint
from edgetune.model.gains import SMALLEST_SQUARE, gains_of
from edgetune.model.lora import Lora, Parameters, RowNorms, Slot

MERGE = "edgetune_merged.json"
"""What the folder is made of; a folder that holds it may be replaced."""
_SENTENCEPIECE = "tokenizer.model"
"""A tokenizer in another format: transformers does without it, and llama.cpp's converter wants it of a Phi-3."""
_CODE = "auto_map"
"""Key of a description that names Python files, which are not copied."""
_PIECE = 16 << 20
"""Bytes of float32 weights that are computed at once, roughly."""


def checkpoint_of(bundle: Bundle, source: str) -> Checkpoint:
    """The checkpoint that a bundle was made from.

    Args:
        bundle: Knows it by its hash.
        source: A local folder, or a hub id that lies in the local cache.

    Raises:
        UsageError: There is no such folder.
        IncompatibleError: It is another checkpoint, of another family or quantised.
        VerificationError: It is incomplete or broken.
    """
    checkpoint, base = open_checkpoint(source, download=False, blocks=False), bundle.manifest.base
    if (found := checkpoint.sha256()) != base.sha256:
        raise IncompatibleError(
            f"{source} is not the checkpoint that the bundle was made from: its safetensors files hash to "
            f"{found[:16]}…, those of {base.name} did to {base.sha256[:16]}…; give that one, its files unchanged"
        )
    return checkpoint


def stored_types(checkpoint: Checkpoint, lora: Lora) -> str:
    """How a checkpoint stores the weights of slots, such as `bf16`."""
    weights = {_weight(slot) for slot in lora.slots}
    headers = [read_header(file) for file in checkpoint.weights]
    return ", ".join(sorted({header[name].dtype.lower() for header in headers for name in weights & header.keys()}))


def write_merged_checkpoint(
    checkpoint: Checkpoint, folder: Path, bundle: Bundle, parameters: Parameters, say: Callable[[str], None]
) -> list[str]:
    """Write the merged checkpoint.

    Args:
        checkpoint: What the bundle was made from.
        folder: A folder under construction.
        bundle: Has the slots, their scaling, and with DoRA the row norms that magnitudes began with.
        parameters: The adapter, as `Lora.shapes` names it.
        say: Called with a line of text for each file of weights.

    Returns:
        The files' names.

    Raises:
        IncompatibleError: A sum is beyond the largest number of the checkpoint's type.
        VerificationError: A file of the tokenizer was not fetched, only what Git LFS puts in its place.
    """
    updates = _updates(bundle.manifest.lora, parameters, read_row_norms(bundle))
    for number, file in enumerate(checkpoint.weights, 1):
        say(f"merging {file.name}, file {number} of {len(checkpoint.weights)}")
        _write_weights(file, folder / file.name, updates)
    index = [file.name for file in checkpoint.weight_files if file not in checkpoint.weights]
    names = (TOKENIZER, _SENTENCEPIECE, *SIDE_FILES, *index)
    beside = [name for name in names if (checkpoint.path / name).is_file()]
    refuse_pointers([checkpoint.path / name for name in beside])
    for name in beside:
        shutil.copyfile(checkpoint.path / name, folder / name)
    described = [name for name in (CONFIG, TOKENIZER_CONFIG) if (checkpoint.path / name).is_file()]
    for name in described:
        _write_description(checkpoint.path / name, folder / name)
    return [*(file.name for file in checkpoint.weights), *beside, *described]


@dataclass(frozen=True)
class _Update:
    """What the weight of a slot becomes."""

    a: NDArray[np.float32]
    """(rank, in)"""
    b: NDArray[np.float32]
    """(out, rank), times scaling."""
    magnitudes: NDArray[np.float32] | None
    """(out,) with DoRA."""

    def merged(self, weights: NDArray[np.float32], start: int) -> NDArray[np.float32]:
        """W + scaling · B·A, with DoRA times the gain, for the rows (n, in) of W from `start` on."""
        rows = slice(start, start + len(weights))
        total: NDArray[np.float32] = weights + self.b[rows] @ self.a
        if self.magnitudes is not None:
            norms = np.sqrt(np.maximum(np.einsum("ij,ij->i", total, total), SMALLEST_SQUARE), dtype=np.float32)
            total *= gains_of(self.magnitudes[rows], norms)[:, None]
        return total


def _updates(lora: Lora, parameters: Parameters, norms: RowNorms) -> dict[str, _Update]:
    """By the weights' names; slots that the adapter leaves as they began are not among them, whose weights stay."""
    found = {}
    for slot in lora.slots:
        magnitudes = parameters[slot.magnitude] if lora.dora else None
        began = magnitudes is None or np.array_equal(magnitudes, norms[slot.name])
        if parameters[slot.b].any() or not began:
            b = parameters[slot.b] * np.float32(lora.scaling_of(slot.module))
            found[_weight(slot)] = _Update(parameters[slot.a], b, magnitudes)
    return found


def _weight(slot: Slot) -> str:
    return f"{slot.name}.weight"


def _write_weights(source: Path, target: Path, updates: dict[str, _Update]) -> None:
    tensors = sorted(read_header(source).items(), key=lambda entry: entry[1].start)
    with source.open("rb") as reader, target.open("wb") as writer:
        _copy(reader, writer, 0, min((tensor.start for _, tensor in tensors), default=source.stat().st_size))
        for name, tensor in tensors:
            if name not in updates:
                _copy(reader, writer, tensor.start, tensor.end)
                continue
            for piece in _merged_rows(reader, name, tensor, updates[name]):
                writer.write(piece)


def _merged_rows(reader: BinaryIO, name: str, tensor: StoredTensor, update: _Update) -> Iterator[bytes]:
    outputs, inputs = tensor.shape
    row = (tensor.end - tensor.start) // outputs
    together = max(1, _PIECE // (4 * inputs))
    reader.seek(tensor.start)
    for start in range(0, outputs, together):
        stored = reader.read(row * min(together, outputs - start))
        merged = update.merged(as_float32(stored, tensor.dtype).reshape(-1, inputs), start)
        written = from_float32(merged, tensor.dtype)
        if not np.isfinite(as_float32(written, tensor.dtype)).all():
            raise IncompatibleError(
                f"{name}: the merged weight is beyond the largest number of {tensor.dtype}, the checkpoint's type; "
                "export without --format safetensors, or make checkpoint and bundle in another type"
            )
        yield written


def _copy(reader: BinaryIO, writer: BinaryIO, start: int, end: int) -> None:
    reader.seek(start)
    for begin in range(start, end, CHUNK):
        writer.write(reader.read(min(CHUNK, end - begin)))


def _write_description(source: Path, target: Path) -> None:
    """Copy a description, without what names code."""
    described = read_object(source, "copy or fetch the checkpoint again")
    if _CODE in described:
        kept = {key: value for key, value in described.items() if key != _CODE}
        write_file(target, f"{json.dumps(kept, indent=2, ensure_ascii=False)}\n".encode())
    else:
        shutil.copyfile(source, target)
