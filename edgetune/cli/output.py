"""Writing to the terminal and to programs."""

from __future__ import annotations

import json
import math
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, cast

import click

from edgetune.cli.interruption import raise_if_interrupted
from edgetune.text.printable import printable

if TYPE_CHECKING:
    from rich.console import Console
    from rich.text import Text


def print_json(value: object) -> None:
    """One JSON value on one line of stdout: ASCII, and null for a number that JSON cannot hold."""
    click.echo(json.dumps(_finite(value), allow_nan=False, default=str))


def notices(*, quiet: bool) -> Callable[[str], None]:
    """What a stage reports its progress to: lines on stderr, so that stdout holds the result only.

    An interruption that was lost in the stage before ends the command there.
    """
    stream = cast(IO[str], LastingStderr())

    def say(text: str) -> None:
        raise_if_interrupted()
        if not quiet:
            click.echo(printable(text), file=stream)

    return say


def console() -> Console:
    """The terminal, or plain text where stdout is none."""
    from rich.console import Console

    width = None if sys.stdout.isatty() else 160
    return Console(file=sys.stdout, width=width, highlight=False, soft_wrap=False)


class LastingStderr:
    """stderr for what is said of long work, which is worth more: when it cannot be written any more, that is forgotten.

    Its reader may have left (`2>&1 | head`), its terminal been closed, or its disk be full.
    """

    def __init__(self) -> None:
        # Not what rich puts in its place later.
        self._stream = sys.stderr

    def write(self, text: str) -> int:
        """As a stream does."""
        with self._lasting():
            self._stream.write(text)
        return len(text)

    def flush(self) -> None:
        """As a stream does."""
        with self._lasting():
            self._stream.flush()

    def __getattr__(self, name: str) -> Any:
        """All else is the stream's."""
        return getattr(self._stream, name)

    @contextmanager
    def _lasting(self) -> Iterator[None]:
        try:
            yield
        except OSError:
            _forget("stderr")
            self._stream = sys.stderr


def replace_closed_streams() -> None:
    """What is written to a stream that was closed before the start (`>&-`) is forgotten, as with `/dev/null`."""
    for name in ("stdin", "stdout", "stderr"):
        if getattr(sys, name) is None:
            _forget(name)


def cell(text: str, style: str = "") -> Text:
    """`text` as a table shows it: printable, and no markup of rich's, however it looks."""
    from rich.text import Text

    return Text(printable(text), style=style)


def _forget(name: str) -> None:
    """Put `/dev/null` in the place of a standard stream."""
    setattr(sys, name, Path(os.devnull).open("r" if name == "stdin" else "w", encoding="utf-8"))  # noqa: SIM115 - open to the end


def _finite(value: Any) -> Any:
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(item) for item in value]
    return value
