"""Protocol Buffers' wire format: walking a message, and changing a part of it, without its schema.

Source: https://protobuf.dev/programming-guides/encoding/. Groups (wire types 3 and 4) are not read: ONNX has none.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from io import BytesIO
from typing import BinaryIO

_VARINT, _FIXED64, _BYTES, _FIXED32 = 0, 1, 2, 5


@dataclass(frozen=True)
class Field:
    """One field of a message, by the places of its bytes in the file."""

    number: int
    value: int
    """Of a varint; 0 otherwise."""
    key: int
    """Where the field begins."""
    start: int
    end: int
    """Where the bytes of its payload lie."""
    nested: bool
    """Whether the payload is of a given length: bytes, a text or a message."""


def fields(file: BinaryIO, start: int, end: int) -> Iterator[Field]:
    """The fields of the message in [start, end); the file may be read elsewhere between two of them.

    Raises:
        ValueError: That is no message.
    """
    position = start
    while position < end:
        file.seek(position)
        first, key = position, _read_varint(file)
        number, wire = key >> 3, key & 7
        if wire == _VARINT:
            value = _read_varint(file)
            position = file.tell()
            yield Field(number, value, first, position, position, nested=False)
            continue
        if wire not in (_FIXED64, _BYTES, _FIXED32):
            raise ValueError(f"wire type {wire} at byte {position:,}")
        length = _read_varint(file) if wire == _BYTES else 8 if wire == _FIXED64 else 4
        payload = file.tell()
        position = payload + length
        if position > end:
            raise ValueError(f"a field at byte {payload:,} leads out of its message")
        yield Field(number, 0, first, payload, position, nested=wire == _BYTES)


def messages(data: bytes, number: int) -> Iterator[bytes]:
    """The payloads of every field `number` of a message."""
    for field in fields(BytesIO(data), 0, len(data)):
        if field.number == number and field.nested:
            yield data[field.start : field.end]


def without(message: bytes, number: int) -> bytes:
    """A message without its fields `number`."""
    kept = (field for field in fields(BytesIO(message), 0, len(message)) if field.number != number)
    return b"".join(message[field.key : field.end] for field in kept)


def bytes_field(number: int, payload: bytes) -> bytes:
    """A field that holds bytes, a text or a message."""
    return _varint(number << 3 | _BYTES) + _varint(len(payload)) + payload


def rewrite(message: bytes, path: Sequence[int], change: Callable[[bytes], bytes]) -> bytes:
    """A message in which every message at `path` is replaced; all other bytes stay as they are.

    Args:
        message: The outermost message.
        path: Field numbers that lead to the messages to change, from the outside to the inside.
        change: Gives the new message for an old one.

    Raises:
        ValueError: It is not a message.
    """
    if not path:
        return change(message)
    parts = []
    for field in fields(BytesIO(message), 0, len(message)):
        if field.number == path[0] and field.nested:
            parts.append(bytes_field(path[0], rewrite(message[field.start : field.end], path[1:], change)))
        else:
            parts.append(message[field.key : field.end])
    return b"".join(parts)


def _varint(value: int) -> bytes:
    digits = bytearray()
    while value > 0x7F:
        digits.append(value & 0x7F | 0x80)
        value >>= 7
    return bytes([*digits, value])


def _read_varint(file: BinaryIO) -> int:
    value = 0
    for shift in range(0, 70, 7):
        byte = file.read(1)
        if not byte:
            raise ValueError("cut off")
        value |= (byte[0] & 0x7F) << shift
        if byte[0] < 0x80:
            return value
    raise ValueError("a number of more than 64 bits")
