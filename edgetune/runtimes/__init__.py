"""What executes a training step: one file a runtime, one table of them.

A runtime opens a bundle and gives a session with few methods; the training loop knows nothing else of it.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator
from contextlib import suppress
from importlib import import_module

from edgetune.config import RuntimeName
from edgetune.errors import MissingDependencyError, UsageError
from edgetune.runtimes.contract import Runtime

RUNTIMES: dict[RuntimeName, str] = {
    "openvino": "edgetune.runtimes.openvino",
    "onnxruntime": "edgetune.runtimes.onnxruntime",
    "ort-training": "edgetune.runtimes.ort_training.runtime",
    "qnn": "edgetune.runtimes.qnn",
    "openvino-ep": "edgetune.runtimes.openvino_ep",
    "fpga-hls": "edgetune.runtimes.fpga_hls.runtime",
    "torch": "edgetune.runtimes.torch.runtime",
}
"""Every runtime and the module whose `RUNTIME` is its record, the fastest first."""


def find_runtime(name: str) -> Runtime:
    """The runtime called `name`.

    Raises:
        UsageError: There is no such runtime.
    """
    if name not in RUNTIMES:
        raise UsageError(f"runtime {name!r} is unknown; choose auto, {', '.join(RUNTIMES)}")
    found = import_module(RUNTIMES[name]).RUNTIME
    assert isinstance(found, Runtime)
    return found


def install(runtime: Runtime, notice: Callable[[str], None]) -> None:
    """Let a runtime install what it installs on first use, if anything, before its first session.

    Raises:
        MissingDependencyError: It cannot be installed.
    """
    if runtime.install is not None:
        runtime.install(notice)


def preferred_runtimes(among: Collection[str] | None = None) -> Iterator[str]:
    """The runtimes that `auto` may take on this machine, the fastest first; others are not even imported.

    Args:
        among: Names; all runtimes when they are not given.
    """
    for name in RUNTIMES if among is None else [name for name in RUNTIMES if name in among]:
        with suppress(MissingDependencyError):
            if find_runtime(name).abilities().preferred:
                yield name
