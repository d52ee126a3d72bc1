"""The row norms of the frozen weights under DoRA's slots, which a bundle holds so that no device has to find them.

`row_norms.data` is ‖w_i‖ of every row of every slot's weight, as it is stored: little-endian float32, slot after slot
in the manifest's order. A slot's magnitudes begin with them, and graphs take them as external data.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np

from edgetune.errors import VerificationError
from edgetune.formats.bundle import Bundle
from edgetune.formats.frozen_weights import FrozenWeights
from edgetune.formats.manifest import ROW_NORMS
from edgetune.formats.storage import write_file
from edgetune.model.blocks import dequantised
from edgetune.model.lora import Lora, RowNorms

_FLOAT = np.dtype("<f4")
_ROWS = 1024
"""Rows of a weight that are in memory at a time."""


def offsets(lora: Lora) -> dict[str, int]:
    """Where the norms of each slot begin, in bytes, by the slot's name."""
    found, offset = {}, 0
    for slot in lora.slots:
        found[slot.name] = offset
        offset += _FLOAT.itemsize * slot.out_features
    return found


def read_row_norms(bundle: Bundle) -> RowNorms:
    """The row norms of each slot (out_features,); none of a bundle without DoRA.

    Raises:
        VerificationError: There are fewer or more than the slots have rows, or one is no norm.
    """
    lora = bundle.manifest.lora
    if not lora.dora:
        return {}
    path = bundle.path / ROW_NORMS
    numbers = np.fromfile(path, _FLOAT).astype(np.float32)
    if numbers.size != (rows := sum(slot.out_features for slot in lora.slots)):
        raise VerificationError(f"{path} has {numbers.size:,} norms, expected {rows:,}; make the bundle anew")
    if not (np.isfinite(numbers) & (numbers >= 0)).all():
        raise VerificationError(f"{path} holds what is no norm; make the bundle anew")
    starts = {name: offset // _FLOAT.itemsize for name, offset in offsets(lora).items()}
    return {slot.name: numbers[starts[slot.name] : starts[slot.name] + slot.out_features] for slot in lora.slots}


def write_row_norms(folder: Path, lora: Lora, frozen: FrozenWeights) -> None:
    """Find and write the row norms of a bundle that is being built."""
    write_file(folder / ROW_NORMS, b"".join(_norms(frozen, f"{slot.name}.weight") for slot in lora.slots))


def _norms(frozen: FrozenWeights, name: str) -> bytes:
    squares = []
    start = 0
    for piece in frozen.pieces(name):
        for first in range(0, piece.shape[0], _ROWS):
            rows = (start + first, start + min(first + _ROWS, piece.shape[0]))
            block = frozen.linear(name, rows)
            values = dequantised(block) if block.bits else block.values
            squares.append(np.square(values, dtype=np.float64).sum(axis=1))
        start += piece.shape[0]
    frozen.forget()
    norms: bytes = np.sqrt(np.concatenate(squares)).astype(_FLOAT).tobytes()
    return norms
