"""Whether something failed for want of memory or of room on a disk, whatever it was and however it says so.

Libraries written in C++ turn a refused allocation, mapping or thread into exceptions of their own, whose text alone
tells what happened, and processes end with a signal. This is the one list of those texts and signals.
"""

from __future__ import annotations

import errno
import signal
from collections.abc import Iterator
from typing import Literal

Lack = Literal["memory", "room"]

_NUMBERS: dict[int, Lack] = {
    errno.ENOMEM: "memory",
    errno.ENOSPC: "room",
    errno.EDQUOT: "room",
    errno.EFBIG: "room",
}
_SIGNALS: dict[str, Lack] = {"SIGKILL": "memory", "SIGXFSZ": "room"}
"""What the system ends a process with; Windows has neither."""
_SIGNS: dict[Lack, tuple[str, ...]] = {
    "room": (
        "no space left on device",
        "disk quota exceeded",
        "file too large",
        "not enough space on the disk",  # Windows
        "failed to write :",  # ONNX Runtime, of an adapter's file
        "requested and 0 written",  # numpy, of a file
    ),
    "memory": (
        "bad_alloc",
        "bad allocation",
        "memoryerror",
        "out of memory",
        "out_of_memory",
        "not enough memory",
        "failed to allocate memory",  # ONNX Runtime
        "cannot allocate memory",  # ENOMEM
        "can't alloc",  # oneDNN's kernels
        "could not allocate",
        "unable to allocate",  # numpy
        "mmap failed",
        "failed to map segment from shared object",  # the dynamic linker
        "can't start new thread",
        "pthread_create failed",
        "resource temporarily unavailable",  # EAGAIN: no thread or process more
        "killed signal terminated",  # g++, of its compiler
    ),
}
"""In lower case."""
ADVICE: dict[Lack, str] = {
    "memory": "not enough memory; close other programs, or choose a smaller batch, length or model",
    "room": "not enough room on a disk; free some space, or choose another output",
}
"""What it was, and what helps."""


def lack_behind(error: BaseException) -> Lack | None:
    """What was lacking where `error`, or what led to it, says so."""
    return next((lack for each in _chain(error) if (lack := _lack_of(each))), None)


def lack_of_process(code: int, said: str) -> Lack | None:
    """What was lacking where a process that ended with a code, negative for a signal, says so."""
    if not code:
        return None
    for name, lack in _SIGNALS.items():
        if code == -getattr(signal, name, 0):
            return lack
    return _said(said)


def _chain(error: BaseException) -> Iterator[BaseException]:
    seen: set[int] = set()
    following: BaseException | None = error
    while following is not None and id(following) not in seen:
        seen.add(id(following))
        yield following
        following = following.__cause__ or (None if following.__suppress_context__ else following.__context__)


def _lack_of(error: BaseException) -> Lack | None:
    if isinstance(error, MemoryError):
        return "memory"
    if isinstance(error, OSError) and error.errno in _NUMBERS:
        return _NUMBERS[error.errno]
    return _said(str(error))


def _said(text: str) -> Lack | None:
    text = text.lower()
    return next((lack for lack, signs in _SIGNS.items() if any(sign in text for sign in signs)), None)
