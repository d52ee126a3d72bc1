"""The run record `metrics.jsonl`: one line an optimizer step, each flushed when it is complete.

A line has the keys `step`, `loss`, `learning_rate`, `grad_norm`, `tokens`, `tokens_per_second`, `peak_memory_bytes`,
`seconds` and `memory_bytes`. Where validation loss was measured after the step, it also has `validation_loss`; the
first line has `initial_validation_loss`, measured before any step. A number that is not finite is written as null.
"""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from types import TracebackType

from edgetune.formats.adapter import RECORD
from edgetune.formats.storage import write_in_place
from edgetune.training.observer import StepMetrics

_HIGH_WATER_MARK, _RESIDENT = "VmHWM:", "VmRSS:"
"""Lines of Linux's status of a process. `ru_maxrss` would count what the parent process had used before the fork."""


class RunRecord:
    """Writes the record of a run while it goes on. It is worth less than the run, which goes on without it.

    Args:
        folder: The folder in which `metrics.jsonl` appears, or has its room.
        say: Hears that the record cannot be written any more.
        before: Lines of the steps before.
    """

    def __init__(self, folder: Path, say: Callable[[str], None], before: bytes = b"") -> None:
        self._path, self._say = folder / RECORD, say
        self._file = write_in_place(self._path)
        self._written = 0
        self._fails = False
        self._append(before, "its first line")

    def __enter__(self) -> RunRecord:
        """The record itself."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Close the file, which ends with the last whole line."""
        with suppress(OSError):
            self._file.truncate(self._written)
        with suppress(OSError):
            self._file.close()

    def write(
        self,
        metrics: StepMetrics,
        *,
        validation_loss: float | None = None,
        initial_validation_loss: float | None = None,
    ) -> None:
        """Write the line of a step; once that fails, it is said, and nothing more is written."""
        if self._fails:
            return
        line: dict[str, float | None] = asdict(metrics)
        del line["eta_seconds"]
        if initial_validation_loss is not None:
            line["initial_validation_loss"] = initial_validation_loss
        if validation_loss is not None:
            line["validation_loss"] = validation_loss
        finite = {key: value if value is None or math.isfinite(value) else None for key, value in line.items()}
        self._append(json.dumps(finite, allow_nan=False).encode() + b"\n", f"step {metrics.step}")

    def lines(self) -> bytes:
        """What was written so far."""
        with self._path.open("rb") as file:
            return file.read(self._written)

    def _append(self, data: bytes, what: str) -> None:
        try:
            self._file.write(data)
            self._file.flush()
            self._written += len(data)
        except OSError as error:
            self._fails = True
            self._say(f"{RECORD} ends before {what}: {error.strerror}; the training goes on")


def peak_memory_bytes() -> int | None:
    """Highest resident memory so far of this process and of the children it has now; none where nothing tells."""
    if (peak := _of_all(_HIGH_WATER_MARK)) is not None:
        return peak
    if sys.platform == "win32":
        return None
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def memory_bytes() -> int | None:
    """Resident memory now of this process and of its children; none where nothing tells."""
    return _of_all(_RESIDENT)


def _of_all(key: str) -> int | None:
    own = _status(key, "self")
    return None if own is None else own + sum(_status(key, child) or 0 for child in _children())


def _status(key: str, process: str) -> int | None:
    """Bytes of a line of Linux's status of a process."""
    try:
        status = Path(f"/proc/{process}/status").read_text()
    except OSError:
        return None
    for line in status.splitlines():
        if line.startswith(key):
            return int(line.split()[1]) * 1024
    return None


def _children() -> list[str]:
    """Process ids of the children of this process, whichever thread started them."""
    children: list[str] = []
    for thread in Path("/proc/self/task").iterdir():
        try:
            children += (thread / "children").read_text().split()
        except OSError:
            continue
    return children
