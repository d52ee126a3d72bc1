"""Fresh processes: started, watched, and ended when they take too long."""

from __future__ import annotations

import signal
import subprocess
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from time import perf_counter

from benchmarks.memory import MemoryWatch, PeakMemory

TIME_LIMIT = 1800.0
"""Seconds after which a process is ended."""


class ProcessError(Exception):
    """A process did not do what it was started for; the message is its last line, or the exit code."""


@dataclass(frozen=True)
class Finished:
    """A process that ended well."""

    stdout: str
    seconds: float
    memory: PeakMemory

    def memory_quantities(self) -> dict[str, float]:
        """The peaks in bytes, by name."""
        return {
            "peak_rss": self.memory.resident,
            "peak_largest": self.memory.largest,
            "peak_anonymous": self.memory.anonymous,
            "peak_file": self.memory.file,
        }


def run_watched(
    command: Sequence[str | Path],
    *,
    on_error_line: Callable[[str, float], None] | None = None,
    time_limit: float = TIME_LIMIT,
) -> Finished:
    """Run a command to its end.

    Args:
        command: Program and arguments.
        on_error_line: Hears every line of stderr when it comes, and the seconds since the start.
        time_limit: Seconds.

    Raises:
        ProcessError: It did not end with exit code 0, or took longer than the limit.
    """
    begin = perf_counter()
    output: list[str] = []
    errors: list[str] = []
    arguments = [str(word) for word in command]
    with subprocess.Popen(arguments, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        reader = threading.Thread(target=lambda: output.extend(process.stdout or ()))
        killer = threading.Timer(time_limit, process.kill)
        try:
            with MemoryWatch(process.pid) as watch:
                reader.start()
                killer.start()
                for line in process.stderr or ():
                    errors.append(line)
                    if on_error_line is not None:
                        on_error_line(line, perf_counter() - begin)
                code = process.wait()
        finally:
            killer.cancel()
            process.kill()
            reader.join()
    seconds = perf_counter() - begin
    if code:
        raise ProcessError(f"took longer than {time_limit:g} s" if seconds >= time_limit else _reason(code, errors))
    return Finished("".join(output), seconds, watch.peak())


def _reason(code: int, errors: Sequence[str]) -> str:
    if code == -signal.SIGKILL:
        return "the system ended it, as it does when memory runs out"
    said = "".join(errors).strip().splitlines()
    return said[-1] if said else f"exit code {code}"
