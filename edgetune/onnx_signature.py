"""Inputs and outputs of an ONNX file, read without loading the model or any ONNX package.

Walks the protobuf wire format (ModelProto → GraphProto → ValueInfoProto) and seeks over everything else, so that a
file of gigabytes costs a few reads and no weight, path or operator in it is ever touched.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import BinaryIO

from edgetune.errors import VerificationError
from edgetune.manifest import TensorSpec

_VARINT, _FIXED64, _BYTES, _FIXED32 = 0, 1, 2, 5
_VALUE_INFO_LIMIT = 1 << 20
_DTYPES = {
    1: "float", 2: "uint8", 3: "int8", 4: "uint16", 5: "int16", 6: "int32", 7: "int64", 8: "string", 9: "bool",
    10: "float16", 11: "double", 12: "uint32", 13: "uint64", 16: "bfloat16", 21: "uint4", 22: "int4",
}  # fmt: skip
"""TensorProto.DataType, as bundle manifests name them."""


@dataclass(frozen=True)
class Signature:
    """What a graph takes and gives."""

    inputs: list[TensorSpec]
    outputs: list[TensorSpec]


@dataclass(frozen=True)
class Field:
    """A field of a protobuf message."""

    number: int
    value: int
    """Of a varint; 0 otherwise."""
    start: int
    end: int
    """Where the bytes of a length-delimited field lie in the file."""


def read_signature(path: Path) -> Signature:
    """Read the graph's inputs and outputs.

    Raises:
        VerificationError: The file is not an ONNX model, or was cut off.
    """
    inputs: list[TensorSpec] = []
    outputs: list[TensorSpec] = []
    with path.open("rb") as file:
        size = path.stat().st_size
        try:
            graphs = [field for field in fields(file, 0, size) if field.number == 7]
            if len(graphs) != 1:
                raise ValueError(f"{len(graphs)} graphs in it")
            graph = graphs[0]
            for field in fields(file, graph.start, graph.end):
                if field.number in (11, 12):
                    (inputs if field.number == 11 else outputs).append(_value_info(_payload(file, field)))
        except ValueError as error:
            raise VerificationError(f"{path}: not a readable ONNX model ({error}); make or copy it again") from error
    return Signature(inputs, outputs)


def fields(file: BinaryIO, start: int, end: int) -> Iterator[Field]:
    """The fields of the message in [start, end); the file may be read elsewhere between two of them.

    Raises:
        ValueError: The message was cut off.
    """
    position = start
    while position < end:
        file.seek(position)
        key = _varint(file)
        number, wire = key >> 3, key & 7
        if wire == _VARINT:
            value = _varint(file)
            position = file.tell()
            yield Field(number, value, position, position)
            continue
        if wire not in (_FIXED64, _BYTES, _FIXED32):
            raise ValueError(f"wire type {wire} at byte {position:,}")
        length = _varint(file) if wire == _BYTES else 8 if wire == _FIXED64 else 4
        first = file.tell()
        position = first + length
        if position > end:
            raise ValueError(f"a field at byte {first:,} leads out of its message")
        yield Field(number, 0, first, position)


def _varint(file: BinaryIO) -> int:
    value = 0
    for shift in range(0, 70, 7):
        byte = file.read(1)
        if not byte:
            raise ValueError("cut off")
        value |= (byte[0] & 0x7F) << shift
        if byte[0] < 0x80:
            return value
    raise ValueError("a number of more than 64 bits")


def _payload(file: BinaryIO, field: Field) -> bytes:
    if field.end - field.start > _VALUE_INFO_LIMIT:
        raise ValueError(f"an input or output description of {field.end - field.start:,} bytes")
    file.seek(field.start)
    return file.read(field.end - field.start)


def _messages(data: bytes, number: int) -> Iterator[bytes]:
    for field in fields(BytesIO(data), 0, len(data)):
        if field.number == number:
            yield data[field.start : field.end]


def _value_info(data: bytes) -> TensorSpec:
    """ValueInfoProto: name = 1, type = 2; TypeProto: tensor_type = 1; Tensor: elem_type = 1, shape = 2."""
    name = _text(next(_messages(data, 1), b""))
    tensor = next((tensor for kind in _messages(data, 2) for tensor in _messages(kind, 1)), b"")
    codes = [field.value for field in fields(BytesIO(tensor), 0, len(tensor)) if field.number == 1]
    dtype = _DTYPES.get(codes[0], f"type {codes[0]}") if codes else "not a tensor"
    shape = next(_messages(tensor, 2), b"")
    return TensorSpec(name, dtype, [_dimension(item) for item in _messages(shape, 1)])


def _dimension(data: bytes) -> int | str:
    """TensorShapeProto.Dimension: dim_value = 1, dim_param = 2; neither is an unknown size, written `?`."""
    for field in fields(BytesIO(data), 0, len(data)):
        if field.number == 1:
            return field.value if field.value < 1 << 63 else "?"
        if field.number == 2:
            return _text(data[field.start : field.end])
    return "?"


def _text(data: bytes) -> str:
    return data.decode("utf-8", errors="replace")
