"""Where the frozen weights lie: the index of the GenAI model's data file, by the checkpoint's tensor names.

The layered form reads weights straight from the mapped file; `layers/weights.json` tells it where they are.
"""

from __future__ import annotations

import json
import math
import mmap
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import cattrs
import numpy as np
from cattrs.errors import BaseValidationError
from numpy.typing import NDArray

from edgetune.config import Base
from edgetune.errors import VerificationError
from edgetune.formats.genai import WEIGHTS
from edgetune.formats.json_file import read_object
from edgetune.formats.roles import INDEX
from edgetune.model.architecture import Architecture, tensor_shapes
from edgetune.model.blocks import BITS, BLOCK_SIZE, Block, Range, dequantised

EMBEDDING = "model.embed_tokens.weight"
HEAD = "lm_head.weight"
"""The checkpoint's names of them."""
Layout = Literal["plain", "transposed", "half", "int4", "int8"]
_FLOAT = np.dtype(np.float32)
_FLOATS: dict[str, np.dtype[Any]] = {"plain": _FLOAT, "transposed": _FLOAT, "half": np.dtype(np.float16)}
"""Element types of the layouts that are not in blocks."""
_COPY_AGAIN = "copy the bundle again"
_SHOWN = 5
"""Problems in one message."""


@dataclass(frozen=True)
class Stored:
    """One piece of a tensor, as it lies in the file."""

    layout: Layout
    """`plain`: float32 in the tensor's shape; `transposed`: float32 (in, out); `half`: float16 (in, out); `int4`: uint8
    (out, in / 2), the low nibble first, a weight being (q − 8) · scale; `int8`: uint8 (out, in), (q − 128) · scale."""
    shape: list[int]
    """Of the piece in the checkpoint's orientation: (out, in), or (size,)."""
    offset: int
    """Bytes from the start of the file."""
    scales: int | None = None
    """Offset of the float32 scales (out, in / 32) of an `int4` or `int8` piece."""

    @property
    def bits(self) -> int:
        """Of a weight in blocks; 0 of another."""
        return BITS.get(self.layout, 0)


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
        architecture: Of the bundle: its tensors all have to be there, in their shapes.

    Raises:
        VerificationError: The index is broken, points outside of the bundle's weights, or is of another model.
    """

    def __init__(self, folder: Path, architecture: Architecture) -> None:
        source = folder / INDEX
        try:
            self._index = _converter.structure(read_object(source, _COPY_AGAIN), FrozenIndex)
        except BaseValidationError as error:
            raise VerificationError(f"{source}: cannot be read ({error}); {_COPY_AGAIN}") from error
        self._file = folder / WEIGHTS
        size = self._file.stat().st_size if self._file.is_file() else 0
        if problems := _problems(self._index, size, architecture):
            hidden = f"; … and {len(problems) - _SHOWN} more" if len(problems) > _SHOWN else ""
            raise VerificationError(f"{source}: {'; '.join(problems[:_SHOWN])}{hidden}; {_COPY_AGAIN}")
        # Nothing writes to it; there are runtimes that take no array that is marked so.
        self._bytes = np.memmap(self._file, dtype=np.uint8, mode="c")
        self._viewed = False

    def pieces(self, name: str) -> list[Stored]:
        """The pieces of a tensor.

        Raises:
            VerificationError: There is no such tensor.
        """
        if name not in self._index.tensors:
            raise VerificationError(f"{self._file.parent / INDEX}: {name} is missing; {_COPY_AGAIN}")
        return self._index.tensors[name]

    def shape(self, name: str) -> tuple[int, ...]:
        """A tensor's shape in the checkpoint."""
        return _shape(self.pieces(name))

    def plain(self, name: str) -> NDArray[np.float32]:
        """A tensor that is stored in float32 as the checkpoint has it."""
        (piece,) = self.pieces(name)
        return self._view(piece.offset, piece.shape)

    def rows(self, name: str, indices: NDArray[np.int64]) -> NDArray[np.float32]:
        """Rows (…, columns) of a tensor (rows, columns).

        Where they lie together they are read, not mapped: around each row that is touched, the system would map its
        neighbours as well.
        """
        (piece,) = self.pieces(name)
        columns = piece.shape[1]
        found, places = np.unique(indices, return_inverse=True)
        if piece.scales is not None:
            packed = self._read(piece.offset, found, np.dtype(np.uint8), columns * piece.bits // 8)
            scales = self._read(piece.scales, found, np.dtype(np.float32), columns // BLOCK_SIZE)
            rows = dequantised(Block(packed, scales, bits=piece.bits))
        elif piece.layout == "plain":
            rows = self._read(piece.offset, found, np.dtype(np.float32), columns)
        else:
            rows = self._block(piece, slice(None), slice(None)).values[found].astype(np.float32)
        return rows[places.reshape(indices.shape)]

    def _read(self, offset: int, rows: NDArray[np.int64], dtype: np.dtype[Any], columns: int) -> NDArray[Any]:
        """Rows of a matrix with so many columns."""
        size = columns * dtype.itemsize
        with self._file.open("rb", buffering=0) as file:

            def row(index: int) -> bytes:
                file.seek(offset + index * size)
                return file.read(size)

            found = b"".join(map(row, rows.tolist()))
        return np.frombuffer(found, dtype=dtype).reshape(len(rows), columns)

    def linear(self, name: str, rows: Range | None = None, columns: Range | None = None) -> Block:
        """A linear weight (out, in), or the part of it in these rows and columns, which lies in one piece."""
        start, stop = rows or (0, self.shape(name)[0])
        for piece in self.pieces(name):
            if start < piece.shape[0]:
                break
            start, stop = start - piece.shape[0], stop - piece.shape[0]
        if stop > piece.shape[0]:
            raise VerificationError(f"{self._index.file}: rows of {name} are not stored together; prepare it again")
        return self._block(piece, slice(start, stop), slice(*(columns or (0, piece.shape[1]))))

    def whole(self, name: str) -> NDArray[np.float32]:
        """A linear weight (out, in) in float32: a copy."""
        blocks = self._blocks(name)
        return np.concatenate([dequantised(b) if b.bits else b.values.astype(np.float32) for b in blocks])

    def scales(self, name: str) -> NDArray[np.float32] | None:
        """The scales (out, in / 32) of a linear weight in blocks; none of another."""
        scales = [block.scales for block in self._blocks(name) if block.scales is not None]
        return np.concatenate(scales) if scales else None

    def _blocks(self, name: str) -> list[Block]:
        """The pieces of a linear weight."""
        return [self._block(piece, slice(0, piece.shape[0]), slice(0, piece.shape[1])) for piece in self.pieces(name)]

    def _block(self, piece: Stored, rows: slice, columns: slice) -> Block:
        if piece.scales is None:
            stored = self._view(piece.offset, piece.shape[::-1], _FLOATS[piece.layout]).T
            if piece.layout == "plain":
                stored = self._view(piece.offset, piece.shape)
            return Block(stored[rows, columns], None)
        high, wide = piece.shape
        in_byte = 8 // piece.bits
        packed = self._view(piece.offset, [high, wide // in_byte], np.dtype(np.uint8))
        scales = self._view(piece.scales, [high, wide // BLOCK_SIZE])
        places, blocks = (slice(columns.start // size, columns.stop // size) for size in (in_byte, BLOCK_SIZE))
        return Block(packed[rows, places], scales[rows, blocks], bits=piece.bits)

    def _view(self, offset: int, shape: Sequence[int], dtype: np.dtype[Any] = _FLOAT) -> NDArray[Any]:
        """A view of the file."""
        self._viewed = True
        return self._bytes[offset : offset + dtype.itemsize * math.prod(shape)].view(dtype).reshape(shape)

    def forget(self) -> None:
        """Let the system take the file's pages back; views that are still used bring theirs again from the file."""
        if self._viewed and hasattr(mmap, "MADV_DONTNEED"):
            mapping: mmap.mmap = self._bytes._mmap  # type: ignore[attr-defined]
            mapping.madvise(mmap.MADV_DONTNEED)
        self._viewed = False


def _shape(pieces: list[Stored]) -> tuple[int, ...]:
    return (sum(piece.shape[0] for piece in pieces), *pieces[0].shape[1:])


def _problems(index: FrozenIndex, size: int, architecture: Architecture) -> list[str]:
    """What of an index cannot be, of a file with so many bytes."""
    if index.file != WEIGHTS:
        return [f"the weights' file is {index.file!r:.80}, expected {WEIGHTS!r}"]
    wrong = ((name, _problem(name, pieces, size)) for name, pieces in index.tensors.items())
    problems = [f"{name:.80} {problem}" for name, problem in wrong if problem]
    if problems:
        return problems
    # A list of what a billion layers hold would fill the memory.
    if architecture.num_hidden_layers > len(index.tensors):
        return [f"has {len(index.tensors)} tensors, the manifest says {architecture.num_hidden_layers:,} layers"]
    expected = tensor_shapes(architecture)
    # The builder stores a tied head as well.
    expected[HEAD] = expected[EMBEDDING]
    found = {name: _shape(pieces) for name, pieces in index.tensors.items()}
    return [
        f"{name} is missing" if name not in found else f"{name} has shape {found[name]}, the manifest says {shape}"
        for name, shape in expected.items()
        if found.get(name) != shape
    ]


def _problem(name: str, pieces: list[Stored], size: int) -> str | None:
    """What of a tensor cannot be; none where there is nothing."""
    most = 2 if name.endswith("_proj.weight") else 1
    if not 1 <= len(pieces) <= most or len({tuple(piece.shape[1:]) for piece in pieces}) > 1:
        return f"has {len(pieces)} pieces that do not stand one above the other, expected 1 to {most} that do"
    for piece in pieces:
        in_blocks, dimensions = bool(piece.bits), len(piece.shape)
        # What is no matrix is always stored as it is.
        if min(piece.shape, default=0) < 1 or dimensions > 2 or (dimensions == 1 and piece.layout != "plain"):
            return f"has a {piece.layout} piece of shape {piece.shape!s:.40}"
        if in_blocks != (piece.scales is not None) or (in_blocks and piece.shape[1] % BLOCK_SIZE):
            return f"has a {piece.layout} piece of shape {piece.shape!s:.40} with scales at {piece.scales}"
        if any(start < 0 or start + length > size for start, length in _spans(piece)):
            return f"lies outside of {WEIGHTS}"
    return None


def _spans(piece: Stored) -> list[Range]:
    """First byte and length of what is in the file."""
    count = math.prod(piece.shape)
    if piece.scales is None:
        return [(piece.offset, _FLOATS[piece.layout].itemsize * count)]
    return [(piece.offset, count * piece.bits // 8), (piece.scales, _FLOAT.itemsize * count // BLOCK_SIZE)]


def stored_bytes(architecture: Architecture, base: Base) -> int:
    """Bytes that a model's frozen weights take on the disk, at least: embedding and norms are kept in float32."""
    bits = {"fp32": 32.0, "fp16": 16.0} | {name: count + 32 / BLOCK_SIZE for name, count in BITS.items()}
    counts = {name: math.prod(shape) for name, shape in tensor_shapes(architecture).items()}
    exact = sum(count for name, count in counts.items() if name == EMBEDDING or name.endswith("norm.weight"))
    return 4 * exact + int((sum(counts.values()) - exact) * bits[base] / 8)
