"""Inputs and outputs of an ONNX file, read without loading the model or any ONNX package.

Walks the protobuf wire format (ModelProto → GraphProto → ValueInfoProto) and seeks over everything else, so that a
file of gigabytes costs a few reads and no weight, path or operator in it is ever touched.
"""

from __future__ import annotations

from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import BinaryIO

from edgetune.errors import VerificationError
from edgetune.formats.manifest import TensorSpec
from edgetune.formats.protobuf import Field, fields, messages

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


def _payload(file: BinaryIO, field: Field) -> bytes:
    if field.end - field.start > _VALUE_INFO_LIMIT:
        raise ValueError(f"an input or output description of {field.end - field.start:,} bytes")
    file.seek(field.start)
    return file.read(field.end - field.start)


def _value_info(data: bytes) -> TensorSpec:
    """ValueInfoProto: name = 1, type = 2; TypeProto: tensor_type = 1; Tensor: elem_type = 1, shape = 2."""
    name = _text(next(messages(data, 1), b""))
    tensor = next((tensor for kind in messages(data, 2) for tensor in messages(kind, 1)), b"")
    codes = [field.value for field in fields(BytesIO(tensor), 0, len(tensor)) if field.number == 1]
    dtype = _DTYPES.get(codes[0], f"type {codes[0]}") if codes else "not a tensor"
    shape = next(messages(tensor, 2), b"")
    return TensorSpec(name, dtype, [_dimension(item) for item in messages(shape, 1)])


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
