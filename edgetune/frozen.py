"""Where the frozen weights lie: the index of the GenAI model's data file, by the checkpoint's tensor names.

The layered form reads weights straight from the mapped file; `layers/weights.json` tells it where they are.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import cattrs
import numpy as np
from cattrs.errors import BaseValidationError
from numpy.typing import NDArray

from edgetune.errors import VerificationError

LAYERS = "layers"
"""Folder of a bundle with the graphs of the layered form."""
INDEX = f"{LAYERS}/weights.json"
BLOCK_SIZE = 32
"""Neighbouring weights along the input that share a scale in an int4 model."""
Layout = Literal["plain", "transposed", "int4"]


@dataclass(frozen=True)
class Stored:
    """One piece of a tensor, as it lies in the file."""

    layout: Layout
    """`plain`: float32 in the tensor's shape; `transposed`: float32 (in, out); `int4`: uint8 (out, in / 2), the low
    nibble first, a weight being (q − 8) · scale."""
    shape: list[int]
    """Of the piece in the checkpoint's orientation: (out, in), or (size,)."""
    offset: int
    """Bytes from the start of the file."""
    scales: int | None = None
    """Offset of the float32 scales (out, in / 32) of an `int4` piece."""


@dataclass(frozen=True)
class FrozenIndex:
    """`layers/weights.json`."""

    file: str
    tensors: dict[str, list[Stored]]
    """The pieces of every frozen tensor; they stand one above the other."""


_converter = cattrs.Converter(forbid_extra_keys=True)


def write_index(index: FrozenIndex) -> bytes:
    """The index's bytes."""
    return f"{json.dumps(_converter.unstructure(index), indent=1)}\n".encode()


class FrozenWeights:
    """The frozen weights of a bundle, mapped into memory and never copied as a whole.

    Args:
        folder: The verified bundle.

    Raises:
        VerificationError: The index is broken or points outside of the file.
    """

    def __init__(self, folder: Path) -> None:
        try:
            self._index = _converter.structure(json.loads((folder / INDEX).read_bytes()), FrozenIndex)
        except (OSError, ValueError, BaseValidationError) as error:
            raise VerificationError(f"{folder / INDEX}: cannot be read ({error}); copy the bundle again") from error
        path = folder / self._index.file
        self._bytes = np.memmap(path, dtype=np.uint8, mode="r")
        for name, pieces in self._index.tensors.items():
            if any(end > self._bytes.size for piece in pieces for end in _ends(piece)):
                raise VerificationError(f"{folder / INDEX}: {name} lies outside of {path}; copy the bundle again")

    def pieces(self, name: str) -> list[Stored]:
        """The pieces of a tensor."""
        return self._index.tensors[name]

    def shape(self, name: str) -> tuple[int, ...]:
        """A tensor's shape in the checkpoint."""
        pieces = self.pieces(name)
        return (sum(piece.shape[0] for piece in pieces), *pieces[0].shape[1:])

    def plain(self, name: str) -> NDArray[np.float32]:
        """A tensor that is stored in float32 as the checkpoint has it."""
        (piece,) = self.pieces(name)
        return self.floats(piece.offset, piece.shape)

    def floats(self, offset: int, shape: list[int]) -> NDArray[np.float32]:
        """A view of the file."""
        return self._bytes[offset : offset + 4 * int(np.prod(shape))].view(np.float32).reshape(shape)

    def packed(self, piece: Stored) -> tuple[NDArray[np.uint8], NDArray[np.float32]]:
        """Nibbles (out, in / 2) and scales (out, in / 32) of an `int4` piece: views of the file."""
        rows, columns = piece.shape
        nibbles = self._bytes[piece.offset : piece.offset + rows * columns // 2].reshape(rows, columns // 2)
        return nibbles, self.floats(piece.scales or 0, [rows, columns // BLOCK_SIZE])

    def forget(self) -> None:
        """Let the system take the file's pages back; they come again from the file."""
        import mmap

        mapping = self._bytes._mmap  # type: ignore[attr-defined]
        if hasattr(mmap, "MADV_DONTNEED"):
            mapping.madvise(mmap.MADV_DONTNEED)


def _ends(piece: Stored) -> list[int]:
    count = int(np.prod(piece.shape))
    if piece.layout != "int4":
        return [piece.offset + 4 * count]
    return [piece.offset + count // 2, (piece.scales or 0) + 4 * count // BLOCK_SIZE]
