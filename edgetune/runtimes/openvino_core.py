"""OpenVINO's core, and what edgetune knows of its CPU device without it.

To import this module does not import `openvino`: that takes memory, and only `core` does it so that it keeps to itself.
What imports `openvino` at its top is therefore imported where the core is at hand.
"""

from __future__ import annotations

import os
import sys
from contextlib import suppress
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any, cast

from edgetune.errors import MissingDependencyError
from edgetune.machine.threads import thread_count

DEVICE = "CPU"
_CPU_INFO = Path("/proc/cpuinfo")
_BFLOAT16_FLAGS = frozenset({"avx512_bf16", "avx_ne_convert"})
MOST_SHAPES = 6
"""Compilations of one graph that are held at a time; a batch of another shape needs another."""
_KERNELS = ("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "64")
"""How many kernels oneDNN keeps for the whole process; by default 1,024, some 12 MB for each shape of a batch."""


@cache
def core() -> Any:
    """OpenVINO's core, imported so that it keeps to itself.

    Importing `openvino` imports its model converter, which tells Google Analytics that it was imported. Nothing here
    converts models, and `openvino` does without the converter.

    Raises:
        MissingDependencyError: The package is not installed.
    """
    require_package()
    os.environ.setdefault(*_KERNELS)
    converter = "openvino.tools.ovc"
    absent = "openvino" not in sys.modules and converter not in sys.modules
    if absent:
        # This is how Python is told that a module cannot be imported.
        cast(dict[str, Any], sys.modules)[converter] = None
    try:
        import openvino
    finally:
        if absent:
            del sys.modules[converter]
    return openvino.Core()


def properties_of(device: str) -> dict[str, int]:
    """Properties with which every graph is compiled for a device: one stream, and on the CPU the number of threads."""
    threads = thread_count() if device == DEVICE else None
    return {"NUM_STREAMS": 1, **({} if threads is None else {"INFERENCE_NUM_THREADS": threads})}


def has_bfloat16() -> bool:
    """Whether OpenVINO computes in bfloat16 on this processor.

    On Linux the processor's flags tell, by OpenVINO's own rule: to load it takes memory that whichever runtime is
    chosen instead does not have.
    """
    with suppress(OSError):
        words = _CPU_INFO.read_text(errors="replace").split()
        if "flags" in words:  # of x86
            return not _BFLOAT16_FLAGS.isdisjoint(words)
    return "BF16" in core().get_property(DEVICE, "OPTIMIZATION_CAPABILITIES")


def require_package() -> None:
    """See that OpenVINO can be imported.

    Raises:
        MissingDependencyError: It is not installed.
    """
    if find_spec("openvino") is None:
        raise MissingDependencyError('openvino is not installed; pip install "edgetune[openvino]"')
