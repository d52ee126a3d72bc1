"""Messages between a runtime and its worker: a line of JSON, then the raw bytes of the arrays that it announces.

Imports only the standard library and numpy: the worker loads this file in an environment without edgetune.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any, BinaryIO

import numpy as np

Arrays = Mapping[str, "np.ndarray[Any, Any]"]


def send(stream: BinaryIO, header: Mapping[str, object], arrays: Arrays) -> None:
    """Write one message."""
    contiguous = {name: np.ascontiguousarray(array) for name, array in arrays.items()}
    announced = [[name, array.dtype.str, list(array.shape)] for name, array in contiguous.items()]
    stream.write(json.dumps({**header, "arrays": announced}).encode() + b"\n")
    for array in contiguous.values():
        stream.write(array.data.cast("B") if array.size else b"")
    stream.flush()


def receive(stream: BinaryIO) -> tuple[dict[str, Any], dict[str, Any]] | None:
    """Read one message: its header and its arrays; None when the other side has closed."""
    line = stream.readline()
    if not line:
        return None
    header = json.loads(line)
    arrays = {}
    for name, dtype, shape in header.pop("arrays"):
        array = np.empty(shape, dtype=np.dtype(dtype))
        view = memoryview(array.reshape(-1)).cast("B") if array.size else memoryview(bytearray())
        while view:
            count = stream.readinto(view)  # type: ignore[attr-defined]
            if not count:
                return None
            view = view[count:]
        arrays[name] = array
    return header, arrays
