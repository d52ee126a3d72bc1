"""How many threads compute: one number for every library that a stage uses.

Each library starts threads of its own and is told in a way of its own, where it opens a graph. A stage says the number
once, for all that is opened while it runs; what opens graphs asks for it.
"""

from __future__ import annotations

import ctypes
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from contextvars import ContextVar
from importlib import import_module
from math import ceil
from typing import Any

from edgetune.errors import UsageError
from edgetune.machine.control_group import granted_processors

_asked: ContextVar[int | None] = ContextVar("threads", default=None)
_BLAS = ("scipy_openblas_{}_num_threads64_", "scipy_openblas_{}_num_threads", "openblas_{}_num_threads")
"""How OpenBLAS calls its functions, in numpy's wheels and elsewhere."""


@contextmanager
def computing_with(threads: int | None) -> Iterator[None]:
    """Let all that is opened meanwhile compute with so many threads.

    numpy's products, which need no opening, have as many meanwhile.

    Args:
        threads: How many; without a number whatever `thread_count` said before.

    Raises:
        UsageError: Fewer than one, or more than this process has processors.
    """
    if threads is not None:
        check_threads(threads)
    before = _asked.set(_asked.get() if threads is None else threads)
    try:
        with _numpy_with(thread_count()):
            yield
    finally:
        _asked.reset(before)


def thread_count() -> int | None:
    """Threads for what is opened now.

    Returns:
        What was asked for. Otherwise the processors that this process may use, where that is not all of the machine's:
        libraries count those, and would start more threads than can run. None where nothing limits them; then every
        library takes what suits it best.
    """
    if (asked := _asked.get()) is not None:
        return asked
    usable = usable_processors()
    return usable if usable < (os.cpu_count() or 1) else None


def threads_used() -> int:
    """How many threads compute at the most: `thread_count`, or the machine's processors."""
    return thread_count() or usable_processors()


def usable_processors() -> int:
    """Processors that this process may use: by its affinity, and by what its control groups grant, rounded up."""
    granted = granted_processors()
    return max(1, _affinity() if granted is None else min(_affinity(), ceil(granted)))


def check_threads(threads: int) -> None:
    """Refuse a number that this process cannot compute with.

    Raises:
        UsageError: It is less than one, or more than the processors that the process may run on.
    """
    if threads < 1:
        raise UsageError(f"--threads is {threads}, expected 1 or more; leave it out to use all processors")
    most = _affinity()
    if threads > most:
        raise UsageError(
            f"--threads is {threads}, and this process may run on {most} processor{'s' if most > 1 else ''}: more "
            "threads would wait for each other; give no more, or leave it out"
        )


def _affinity() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


@contextmanager
def _numpy_with(threads: int | None) -> Iterator[None]:
    """Let numpy's products have so many threads meanwhile, where its BLAS is OpenBLAS."""
    functions = None if threads is None else _blas()
    if functions is None:
        yield
        return
    get, put = functions
    before = get()
    put(threads)
    try:
        yield
    finally:
        put(before)


def _blas() -> tuple[Callable[[], int], Callable[[int | None], Any]] | None:
    """The functions of numpy's BLAS that say and set how many threads it has; none where it is another one."""
    with suppress(OSError):
        # What a library was linked with is found through it.
        library = ctypes.CDLL(import_module("numpy._core._multiarray_umath").__file__)
        for name in _BLAS:
            with suppress(AttributeError):
                return getattr(library, name.format("get")), getattr(library, name.format("set"))
    return None
