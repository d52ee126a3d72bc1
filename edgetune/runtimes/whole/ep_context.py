"""What an EPContext model may hold: compiled data inside, and no path.

`EPContext` is ONNX Runtime's operator for a partition that a provider has compiled; with `embed_mode` 0 its
`ep_cache_context` is a path (https://onnxruntime.ai/docs/execution-providers/EP-Context-Design.html).
"""

from __future__ import annotations

from collections.abc import Iterator
from io import BytesIO

from edgetune.errors import VerificationError
from edgetune.formats.protobuf import Field, fields

_OPERATOR = b"EPContext"
_EMBEDDED = 1
_LONGEST_NAME = 4096


def check_ep_context(data: bytes) -> None:
    """Refuse a model that makes ONNX Runtime or a provider read another file.

    A field that may occur once is looked at as often as it occurs, whichever of them a reader takes.

    Args:
        data: The ONNX file.

    Raises:
        VerificationError: A node or a tensor names a file; or this is no ONNX model.
    """
    try:
        _Reader(data).model()
    except ValueError as error:
        raise VerificationError(f"a compiled context is no readable ONNX model ({error}); delete the cache") from error


class _Reader:
    """Walks the protobuf wire format; compiled data is never copied."""

    def __init__(self, data: bytes) -> None:
        self._file = BytesIO(data)
        self._size = len(data)

    def model(self) -> None:
        """ModelProto: graph = 7, functions = 25; FunctionProto: node = 7."""
        graphs = 0
        for field in fields(self._file, 0, self._size):
            if field.number == 7:
                graphs += 1
                self._graph(field)
            elif field.number == 25:
                for node in self._inside(field, 7):
                    self._node(node)
        if not graphs:
            raise ValueError("no graph in it")

    def _graph(self, graph: Field) -> None:
        """GraphProto: node = 1, initializer = 5, sparse_initializer = 15 with tensors 1 and 2."""
        for field in fields(self._file, graph.start, graph.end):
            if field.number == 1:
                self._node(field)
            elif field.number == 5:
                self._tensor(field)
            elif field.number == 15:
                for tensor in self._inside(field, 1, 2):
                    self._tensor(tensor)

    def _node(self, node: Field) -> None:
        """NodeProto: op_type = 4, attribute = 5."""
        context = any(self._text(field) == _OPERATOR for field in self._inside(node, 4))
        for attribute in self._inside(node, 5):
            self._attribute(attribute)
        if context and not self._is_embedded(node):
            names = (name for each in self._named(node, b"ep_cache_context") for name in self._inside(each, 4))
            path = next((self._text(name).decode(errors="replace") for name in names), "")
            raise VerificationError(
                f"a compiled context names the file {path!r:.80}; expected the context itself (embed_mode 1)"
            )

    def _attribute(self, attribute: Field) -> None:
        """AttributeProto: t = 5, g = 6, tensors = 10, graphs = 11."""
        for field in fields(self._file, attribute.start, attribute.end):
            if field.number in (5, 10):
                self._tensor(field)
            elif field.number in (6, 11):
                self._graph(field)

    def _tensor(self, tensor: Field) -> None:
        """TensorProto: external_data = 13."""
        if any(True for _ in self._inside(tensor, 13)):
            raise VerificationError("a compiled context has weights in another file; expected them inside")

    def _is_embedded(self, node: Field) -> bool:
        """AttributeProto: i = 3; 1 where it is not given."""
        modes = [
            field.value
            for attribute in self._named(node, b"embed_mode")
            for field in fields(self._file, attribute.start, attribute.end)
            if field.number == 3
        ]
        given = any(True for _ in self._named(node, b"embed_mode"))
        return all(mode == _EMBEDDED for mode in modes) and bool(modes) == given

    def _named(self, node: Field, name: bytes) -> Iterator[Field]:
        """The attributes of that name; AttributeProto: name = 1."""
        for attribute in self._inside(node, 5):
            if any(self._text(field) == name for field in self._inside(attribute, 1)):
                yield attribute

    def _inside(self, message: Field, *numbers: int) -> Iterator[Field]:
        return (field for field in fields(self._file, message.start, message.end) if field.number in numbers)

    def _text(self, field: Field) -> bytes:
        self._file.seek(field.start)
        return self._file.read(min(field.end - field.start, _LONGEST_NAME))
