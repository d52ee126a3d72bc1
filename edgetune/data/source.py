"""Where rows come from: a file, packed or not, or a pipe, which can be read once."""

from __future__ import annotations

import io
import os
import stat
import sys
import zlib
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from itertools import chain
from pathlib import Path
from tempfile import TemporaryFile
from typing import IO, Any, BinaryIO, cast

from edgetune.errors import DataError, UsageError

STDIN = Path("-")
"""Stands for standard input."""
MOST_BYTES = 4 << 30
"""Of what has no size before it is read: what a pipe gives, or a packed file holds."""
MOST_RATIO, FREE_BYTES = 200, 16 << 20
"""How much more a packed file may hold than it is large, and how much it may hold in any case. Rows are packed to a
third or a twentieth; gzip can pack what is all alike to a thousandth."""
_PIECE = 1 << 16
"""Bytes that are read, or unpacked, at a time."""
_GZIP = b"\x1f\x8b"
_GZIP_WINDOW = 16 + zlib.MAX_WBITS


class SourceError(ValueError):
    """What is wrong with the bytes themselves, at the line that was being read."""


class Kept:
    """What came through a pipe, in a private file without a name, so that it can be read again.

    Args:
        source: The pipe.
        file: Its bytes.
    """

    def __init__(self, source: Path, file: IO[bytes]) -> None:
        self.source, self.file = source, file


Source = Path | Kept


def name_of(source: Source) -> str:
    """How messages call it."""
    path = source.source if isinstance(source, Kept) else source
    return "<stdin>" if path == STDIN else str(path)


def is_lasting(source: Path) -> bool:
    """Whether it is a file that can be read again, later as well."""
    return source != STDIN and source.is_file()


def require_source(source: Path, option: str = "") -> None:
    """Refuse what rows cannot be read from, without opening it.

    Args:
        source: A path, or `STDIN`.
        option: That named it.

    Raises:
        UsageError: There is nothing, a folder or a device.
    """
    if source == STDIN:
        return
    name = f"{option} {source}".strip()
    try:
        status = source.stat()
    except FileNotFoundError as error:
        raise UsageError(f"{name}: no such file; give the path of a file of rows, or - for standard input") from error
    except OSError as error:
        raise _unreadable(name, error) from error
    if stat.S_ISDIR(status.st_mode):
        raise UsageError(f"{name} is a folder; expected a JSONL file, or - for standard input")
    if not (stat.S_ISREG(status.st_mode) or stat.S_ISFIFO(status.st_mode) or _is_terminal(status)):
        raise UsageError(f"{name} is neither a file nor a pipe; expected a JSONL file, or - for standard input")


def refuse_shared(first: Path, second: Path, options: str) -> None:
    """Refuse two sources that are one pipe: whoever reads first would leave nothing to the other.

    Args:
        first: A path, or `STDIN`.
        second: Another.
        options: What named them.

    Raises:
        UsageError: They are the same.
    """
    if (first == second == STDIN) or _is_same_pipe(first, second):
        raise UsageError(
            f"{options} are both {name_of(first)}, which can be read only once; put the rows of one into a file"
        )


@contextmanager
def kept(source: Path) -> Iterator[Source]:
    """A source that can be read more than once: the same, or what a pipe gives in a file that nobody else can open.

    Raises:
        UsageError: Nothing can be read there.
        DataError: The pipe gives more than `MOST_BYTES`.
    """
    require_source(source)
    if is_lasting(source):
        yield source
        return
    with TemporaryFile() as file:
        with _opened(source) as stream:
            try:
                for piece in _counted(_pieces(stream)):
                    file.write(piece)
            except SourceError as error:
                raise DataError([f"{name_of(source)}: {error}"]) from error
        yield Kept(source, file)


@contextmanager
def open_source(source: Source) -> Iterator[BinaryIO]:
    """The bytes of a source from its beginning, unpacked where they are gzip's, whatever its name.

    What is read from it raises SourceError where the packed data is damaged or ends too early, or where there is too
    much of it.

    Raises:
        UsageError: Nothing can be read there.
    """
    if isinstance(source, Path):
        require_source(source)
    with _opened(source) as stream:
        pieces = _pieces(stream)
        begin = b""
        for piece in pieces:
            begin += piece
            if len(begin) >= len(_GZIP):
                break
        pieces = chain([begin] if begin else [], pieces)
        if begin.startswith(_GZIP):
            pieces = _counted(_unpacked(pieces))
        elif isinstance(source, Path) and not is_lasting(source):
            pieces = _counted(pieces)
        try:
            yield io.BufferedReader(_Stream(pieces), _PIECE)
        except OSError as error:
            raise _unreadable(name_of(source), error) from error


@contextmanager
def _opened(source: Source) -> Iterator[BinaryIO]:
    if isinstance(source, Kept):
        source.file.seek(0)
        yield cast(BinaryIO, source.file)
    elif source == STDIN:
        with suppress(OSError, AttributeError):  # Windows has the call from Python 3.12 on
            # Whoever shares the pipe may have it so that a read finds nothing yet, which would look like its end.
            os.set_blocking(sys.stdin.fileno(), True)
        yield sys.stdin.buffer
    else:
        try:
            file = source.open("rb")
        except OSError as error:
            raise _unreadable(str(source), error) from error
        with file:
            yield file


def _pieces(stream: BinaryIO) -> Iterator[bytes]:
    """What is there, without waiting for more than that."""
    read = getattr(stream, "read1", stream.read)
    while piece := read(_PIECE):
        yield piece


def _counted(pieces: Iterator[bytes]) -> Iterator[bytes]:
    total = 0
    for piece in pieces:
        total += len(piece)
        if total > MOST_BYTES:
            raise SourceError(f"more than {MOST_BYTES:,} bytes came until here; put the rows into files, unpacked")
        yield piece


def _unpacked(pieces: Iterator[bytes]) -> Iterator[bytes]:
    """The content of a gzip file of one member or several (RFC 1952), a piece at a time."""
    member = zlib.decompressobj(_GZIP_WINDOW)
    taken = given = 0
    for piece in pieces:
        taken += len(piece)
        while piece:
            if member.eof:
                # Zeros may fill up the last block of a tape.
                piece = piece.lstrip(b"\0")
                if not piece:
                    break
                member = zlib.decompressobj(_GZIP_WINDOW)
            try:
                unpacked = member.decompress(piece, _PIECE)
            except zlib.error as error:
                raise SourceError(f"the gzip data is damaged ({_reason(error)}); pack the rows again") from error
            piece = member.unused_data if member.eof else member.unconsumed_tail
            given += len(unpacked)
            if given > max(FREE_BYTES, MOST_RATIO * taken):
                raise SourceError(
                    f"the gzip data holds more than {MOST_RATIO} times its size until here, as no rows do; unpack it "
                    "yourself if it is what you want"
                )
            if unpacked:
                yield unpacked
    if not member.eof:
        raise SourceError("the gzip data ends too early; copy the file again, or pack the rows again")


def _reason(error: zlib.error) -> str:
    return str(error).rpartition(": ")[2]


class _Stream(io.RawIOBase):
    """Pieces of bytes as a stream."""

    def __init__(self, pieces: Iterator[bytes]) -> None:
        self._pieces, self._left = pieces, b""

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        view = memoryview(buffer)
        piece = self._left or next(self._pieces, b"")
        view[: len(piece)] = piece[: len(view)]
        self._left = piece[len(view) :]
        return min(len(piece), len(view))


def _is_terminal(status: os.stat_result) -> bool:
    """Whether it is the terminal at standard input. A device that is none may give bytes without end."""
    return os.isatty(0) and os.path.samestat(status, os.fstat(0))


def _unreadable(name: str, error: OSError) -> UsageError:
    return UsageError(f"{name}: cannot be read ({error.strerror or error}); check the path and its rights")


def _is_same_pipe(first: Path, second: Path) -> bool:
    try:
        one, two = (os.fstat(sys.stdin.fileno()) if path == STDIN else path.stat() for path in (first, second))
    except OSError:
        return False
    return os.path.samestat(one, two) and (STDIN in (first, second) or not stat.S_ISREG(one.st_mode))
