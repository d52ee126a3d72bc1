"""Messages between a runtime and its worker: a line of JSON, then the raw bytes of the arrays that it announces.

Imports only the standard library and numpy: the worker loads this file in an environment without edgetune.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from typing import IO, Any

import numpy as np

Arrays = Mapping[str, "np.ndarray[Any, Any]"]


def send(stream: IO[bytes], header: Mapping[str, object], arrays: Arrays) -> None:
    """Write one message."""
    contiguous = {name: np.ascontiguousarray(array) for name, array in arrays.items()}
    announced = [[name, array.dtype.str, list(array.shape)] for name, array in contiguous.items()]
    stream.write(json.dumps({**header, "arrays": announced}).encode() + b"\n")
    for array in contiguous.values():
        stream.write(array.data.cast("B") if array.size else b"")
    stream.flush()


def receive(stream: IO[bytes]) -> tuple[dict[str, Any], dict[str, Any]] | None:
    """Read one message: its header and its arrays; None when the other side has closed."""
    line = stream.readline()
    if not line:
        return None
    header = json.loads(line)
    arrays = {}
    for name, dtype, shape in header.pop("arrays"):
        kind = np.dtype(dtype)
        size = kind.itemsize * math.prod(shape)
        data = stream.read(size)
        if len(data) < size:
            return None
        arrays[name] = np.frombuffer(bytearray(data), dtype=kind).reshape(shape)
    return header, arrays
