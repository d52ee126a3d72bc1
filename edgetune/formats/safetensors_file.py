"""Safetensors files that others wrote: what is in them, why one cannot be read, their numbers as float32 and back.

The format: eight bytes that say how long the header is (little-endian), a header in JSON, the tensors' bytes.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import numpy as np
from numpy.typing import NDArray

from edgetune.errors import VerificationError
from edgetune.formats.git_lfs import refuse_pointers
from edgetune.model.bfloat16 import from_bfloat16, to_bfloat16

_CHUNK = 1 << 20
"""Bytes that are looked at in one go; they stay in the processor's cache."""
_LENGTH = 8
"""Bytes that say how long the header is."""
_LONGEST_HEADER = 100_000_000
"""Bytes; no reader of the format takes more."""
_EXPONENTS = {"F32": ("<u4", 0x7F800000), "F16": ("<u2", 0x7C00), "BF16": ("<u2", 0x7F80)}
"""The bits of the exponent by type: all of them are set in NaN and infinity, and in no other number (IEEE 754)."""
NUMPY_TYPES = {"F32": "<f4", "F64": "<f8", "I64": "<i8", "U8": "|u1"}
"""Types that `write_tensors` writes and `read_tensor` reads, by the format's names."""
_NAMES = {numpy: name for name, numpy in NUMPY_TYPES.items()}
FLOATS = tuple(_EXPONENTS)
"""Types of floating-point numbers that are looked at, and read; all of them are exact in float32."""


@dataclass(frozen=True)
class StoredTensor:
    """One entry of a header."""

    dtype: str
    """As safetensors calls it: `F32`, `BF16` and so on."""
    shape: tuple[int, ...]
    start: int
    """Byte of the file that it begins at."""
    end: int
    """The byte after its last one."""


def write_tensors(file: IO[bytes], tensors: Mapping[str, NDArray[Any]], metadata: Mapping[str, str]) -> None:
    """Write a safetensors file without a second copy of its tensors in memory, as the format's own library makes.

    Args:
        file: Open for writing.
        tensors: By name; of the types in `NUMPY_TYPES`.
        metadata: What else the header says.
    """
    header: dict[str, Any] = {"__metadata__": dict(metadata)}
    arrays = {name: np.ascontiguousarray(array).reshape(array.shape) for name, array in tensors.items()}
    end = 0
    for name, array in arrays.items():
        begin, end = end, end + array.nbytes
        header[name] = {"dtype": _NAMES[array.dtype.str], "shape": list(array.shape), "data_offsets": [begin, end]}
    data = json.dumps(header).encode()
    data += b" " * (-len(data) % _LENGTH)  # the tensors are aligned
    file.write(len(data).to_bytes(_LENGTH, "little") + data)
    for array in arrays.values():
        file.write(array.reshape(-1).view(np.uint8).data)


def read_metadata(path: Path) -> dict[str, str]:
    """What the header of a file that `read_header` took says beside its tensors."""
    from safetensors import safe_open

    with safe_open(path, framework="numpy") as file:
        return dict(file.metadata() or {})


def read_tensor(path: Path, tensor: StoredTensor) -> NDArray[Any]:
    """The values of one entry of a header, of a type in `NUMPY_TYPES`."""
    dtype = np.dtype(NUMPY_TYPES[tensor.dtype])
    count = (tensor.end - tensor.start) // dtype.itemsize
    return np.fromfile(path, dtype, count, offset=tensor.start).reshape(tensor.shape)


def read_floats(path: Path, tensor: StoredTensor) -> NDArray[np.float32]:
    """The values of one entry of a header, of a type in `FLOATS`."""
    stored = np.fromfile(path, np.uint8, tensor.end - tensor.start, offset=tensor.start)
    return as_float32(stored.data, tensor.dtype).reshape(tensor.shape)


def as_float32(data: bytes | memoryview, dtype: str) -> NDArray[np.float32]:
    """The numbers (n,) of a tensor's bytes, or of some of them.

    Args:
        data: Whole numbers' bytes.
        dtype: One of `FLOATS`.
    """
    if dtype == "BF16":
        return from_bfloat16(np.frombuffer(data, "<u2"))
    return np.frombuffer(data, {"F32": "<f4", "F16": "<f2"}[dtype]).astype(np.float32)


def from_float32(values: NDArray[np.float32], dtype: str) -> bytes:
    """The bytes of numbers, each rounded to the nearest that a type has, and between two of them to the even one.

    Args:
        values: Finite; what is beyond the type's largest number becomes infinity.
        dtype: One of `FLOATS`.
    """
    if dtype == "BF16":
        return to_bfloat16(values).astype("<u2").tobytes()
    with np.errstate(over="ignore"):
        return values.astype({"F32": "<f4", "F16": "<f2"}[dtype]).tobytes()


def read_header(path: Path, again: str = "copy or download it again") -> dict[str, StoredTensor]:
    """Every tensor by name; no number is read.

    Args:
        path: The file; nobody needs to have verified it.
        again: What messages say to do about a broken file.

    Raises:
        VerificationError: It is a Git LFS pointer, cut off, something else than safetensors, or cannot be read.
    """
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="numpy"):
            pass  # it has checked all: no holes, no overlaps, nothing outside of the file
        base, entries = _entries(path)
    except (SafetensorError, OSError) as error:
        refuse_pointers([path])
        reason = _reason(path) or f"not a valid safetensors file ({error})"
        raise VerificationError(f"{path}: {reason}; {again}") from error
    return {
        name: StoredTensor(entry["dtype"], tuple(entry["shape"]), *(base + offset for offset in entry["data_offsets"]))
        for name, entry in entries
    }


def _entries(path: Path) -> tuple[int, list[tuple[str, dict[str, Any]]]]:
    """Where the tensors' bytes begin, and the header's entries."""
    with path.open("rb") as file:
        length = int.from_bytes(file.read(_LENGTH), "little")
        header = json.loads(file.read(min(length, _LONGEST_HEADER)))
    return _LENGTH + length, [(name, entry) for name, entry in header.items() if name != "__metadata__"]


def _reason(path: Path) -> str | None:
    """That a file was cut off, and where; None when it is broken in another way."""
    try:
        size = path.stat().st_size
        if size < _LENGTH:
            return f"is cut off: it has {size} bytes, less than any safetensors file"
        with path.open("rb") as file:
            length, begins = int.from_bytes(file.read(_LENGTH), "little"), file.read(1)
        if length > _LONGEST_HEADER or begins not in (b"", b"{"):
            return None
        if size < _LENGTH + length:
            return f"is cut off: it has {size:,} bytes, its header alone takes {_LENGTH + length:,}"
        base, entries = _entries(path)
        whole = base + max(int(entry["data_offsets"][1]) for _, entry in entries)
    except (OSError, ValueError, RecursionError, LookupError, TypeError, AttributeError):
        return None
    return f"is cut off: it has {size:,} of {whole:,} bytes" if size < whole else None


def non_finite(path: Path, tensors: Iterable[tuple[str, StoredTensor]]) -> Iterator[str]:
    """Names of the tensors that hold NaN or infinity, read in pieces of 1 MiB.

    Args:
        path: A safetensors file.
        tensors: Entries of its header, of types in `FLOATS`.
    """
    buffer = memoryview(bytearray(_CHUNK))
    with path.open("rb") as file:
        for name, tensor in tensors:
            kind, exponent = _EXPONENTS[tensor.dtype]
            file.seek(tensor.start)
            for begin in range(tensor.start, tensor.end, _CHUNK):
                piece = buffer[: min(_CHUNK, tensor.end - begin)]
                file.readinto(piece)
                bits = np.frombuffer(piece, kind)
                if np.bitwise_and(bits, exponent, out=bits).max() == exponent:
                    yield name
                    break
