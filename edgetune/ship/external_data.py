"""The weights that a graph takes from other files: finding the references, and pointing them elsewhere.

Source: https://github.com/onnx/onnx/blob/main/docs/ExternalData.md. A graph without its weights is small, so it is read
whole; nothing else in it is touched, and no ONNX package is needed.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from edgetune.formats.protobuf import bytes_field, messages, rewrite, without

_INITIALIZERS = (7, 5)
"""ModelProto.graph, GraphProto.initializer."""
_NAME, _EXTERNAL_DATA = 8, 13
"""Of a TensorProto."""
_KEY, _VALUE = 1, 2
"""Of a StringStringEntryProto."""


@dataclass(frozen=True, order=True)
class Span:
    """Bytes of a file."""

    file: str
    offset: int
    length: int

    @property
    def end(self) -> int:
        """The first byte behind it."""
        return self.offset + self.length


def external_spans(graph: bytes) -> list[tuple[str, Span]]:
    """Name and bytes of each initializer that is not in the graph itself.

    Raises:
        ValueError: The file is not an ONNX model, or a reference has no offset or length.
    """
    tensors = [tensor for body in messages(graph, _INITIALIZERS[0]) for tensor in messages(body, _INITIALIZERS[1])]
    return [(_name(tensor), span) for tensor in tensors if (span := _span(tensor)) is not None]


def redirect(graph: bytes, move: Callable[[Span], Span]) -> bytes:
    """The same graph, with every reference replaced by what `move` makes of it.

    Raises:
        ValueError: See `external_spans`.
    """

    def redirected(tensor: bytes) -> bytes:
        span = _span(tensor)
        if span is None:
            return tensor
        # A repeated field is the list of all its occurrences, wherever they stand.
        entries = b"".join(bytes_field(_EXTERNAL_DATA, entry) for entry in _entries(move(span)))
        return without(tensor, _EXTERNAL_DATA) + entries

    return rewrite(graph, _INITIALIZERS, redirected)


def _name(tensor: bytes) -> str:
    return next(messages(tensor, _NAME), b"").decode("utf-8")


def _span(tensor: bytes) -> Span | None:
    entries = [
        [next(messages(entry, number), b"").decode("utf-8") for number in (_KEY, _VALUE)]
        for entry in messages(tensor, _EXTERNAL_DATA)
    ]
    if not entries:
        return None
    values = dict(entries)
    if missing := {"location", "offset", "length"} - values.keys():
        raise ValueError(f"the external data of {_name(tensor)} has no {' and no '.join(sorted(missing))}")
    return Span(values["location"], int(values["offset"]), int(values["length"]))


def _entries(span: Span) -> list[bytes]:
    values = {"location": span.file, "offset": str(span.offset), "length": str(span.length)}
    return [bytes_field(_KEY, key.encode()) + bytes_field(_VALUE, value.encode()) for key, value in values.items()]
