"""Tar archives of others, plain or gzipped, read from front to back: what is wanted of them is written to a folder.

Python's `tarfile` reads headers of any length into memory, and up to 2025 went in circles at a negative offset. Here
nothing is sought and nothing that a header says is believed before it was checked; links and devices are never made,
and no file gets a name that an archive chose.

The format: blocks of 512 bytes; a header says name, size and kind of what follows (POSIX.1-1988, ustar). Longer names
and sizes stand in a member of their own before it, in GNU's way (kind L) or that of POSIX.1-2001 (kind x).
"""

from __future__ import annotations

import gzip
import tempfile
import zlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from edgetune.errors import VerificationError

MOST_BYTES = 1 << 33
"""That an archive may unpack to; the adapter of a model with 14 B weights at rank 256 takes 3.6 GB in float32."""
MOST_HEADERS = 200_000
"""Of members, and of what is said before them."""
_BLOCK, _CHUNK = 512, 1 << 20
_LONGEST_TEXT, _MOST_TEXT = 1 << 16, 1 << 24
"""Bytes of a member that says the name of the next one, and of all of them; Python would read them for hours."""
_PACKED = {
    b"\x28\xb5\x2f\xfd": "zstd",
    b"BZh": "bzip2",
    b"\xfd7zXZ": "xz",
    b"PK\x03\x04": "zip",
}  # fmt: skip
"""How files begin that are packed in ways which are not read."""
_GZIP = b"\x1f\x8b"
_FILES = (b"0", b"\0", b"7")
_ABOUT_THE_NEXT = (b"L", b"K", b"x", b"g")
"""Kinds of members that say the name of the next one, the end of its link, or more of it, or of all."""
_WITHOUT_BYTES = (b"1", b"2", b"3", b"4", b"5", b"6")
"""Links, devices, folders and pipes: none follow, whatever their headers say."""

Files = Mapping[str, Path | None]
"""Files by their path in a folder, archive or image; None for what is no regular file, or nobody asked for."""


@dataclass(frozen=True)
class Member:
    """What an archive says of one of its members."""

    name: str
    """Its path in the archive, without `./` or `/` before it."""
    is_file: bool
    """Neither a folder nor a link, a device or a sparse file."""


class Tar:
    """The members of an archive, and the bytes of the current one."""

    def __init__(self, stream: IO[bytes], shown: str) -> None:
        """Begin at the front.

        Args:
            stream: Where the archive's bytes come from, unpacked.
            shown: How messages call it.
        """
        self._stream, self._shown = stream, shown
        self._left = self._read = self._told = self._headers = 0
        """Bytes of the current member that nobody took yet, of all that were read, and of headers' texts; headers."""

    def __iter__(self) -> Iterator[Member]:
        """Each member in turn; what of the one before was not taken is passed over.

        Raises:
            VerificationError: It is no tar archive, cut off, too large, or has a name that leads out of it.
        """
        while described := self._next_header():
            name, size, kind = described
            self._left = size
            yield Member(self._plain(name), kind in _FILES and not name.endswith("/"))
            for _ in self.data():
                pass
            self._exactly(-size % _BLOCK)
        while self._stream_piece(_CHUNK):
            pass  # what gzip says of all bytes stands at the end

    def data(self) -> Iterator[bytes]:
        """The bytes of the current member, in pieces of 1 MiB at most."""
        while self._left:
            piece = self._exactly(min(_CHUNK, self._left))
            self._left -= len(piece)
            yield piece

    def _next_header(self) -> tuple[str, int, bytes] | None:
        """Name, bytes and kind of the next member; None after the last one."""
        name, size = None, None
        while any(header := self._exactly(_BLOCK)):
            self._check(header)
            kind, said = header[156:157], self._number(header[124:136])
            if kind in _ABOUT_THE_NEXT:
                if said > _LONGEST_TEXT:
                    raise self._broken(f"has a header of {said:,} bytes")
                self._told += said
                if self._told > _MOST_TEXT:
                    raise self._broken(f"has headers of more than {_MOST_TEXT:,} bytes")
                text = self._exactly(said)
                self._exactly(-said % _BLOCK)
                if kind == b"L":
                    name = text.split(b"\0")[0]
                elif kind == b"x":
                    records = self._records(text)
                    name = records.get(b"path", name)
                    size = self._decimal(records[b"size"]) if b"size" in records else size
                continue
            if name is None:
                prefix = header[345:500].split(b"\0")[0] if header[257:262] == b"ustar" else b""
                name = prefix + b"/" * bool(prefix) + header[:100].split(b"\0")[0]
            holds = kind not in _WITHOUT_BYTES
            return name.decode("utf-8", "surrogateescape"), (said if size is None else size) if holds else 0, kind
        return None

    def _check(self, header: bytes) -> None:
        """See that a block is a header, by its own sum, which counts its place as spaces; and count it."""
        self._headers += 1
        if self._headers > MOST_HEADERS:
            raise self._broken(f"has more than {MOST_HEADERS:,} headers")
        if sum(header[:148]) + sum(header[156:]) + 8 * ord(" ") != self._number(header[148:156]):
            raise self._broken("is no tar archive, or was changed")

    def _number(self, field: bytes) -> int:
        """Octal digits, or a binary number where the first bit is set (GNU)."""
        if field[0] == 0x80:
            return int.from_bytes(field[1:], "big")
        digits = field.split(b"\0")[0].strip()
        if digits and not set(digits) <= set(b"01234567"):
            raise self._broken("is no tar archive, or was changed")
        return int(digits or b"0", 8)

    def _records(self, text: bytes) -> dict[bytes, bytes]:
        """What a header of POSIX.1-2001 says: records `LENGTH KEY=VALUE` and a new line."""
        records, begin = {}, 0
        while begin < len(text):
            length = self._decimal(text[begin : begin + 20].split(b" ")[0])
            end = begin + length
            key, equals, value = text[begin:end].partition(b" ")[2].partition(b"=")
            if not length or end > len(text) or not equals or not value.endswith(b"\n"):
                raise self._broken("has a header that says nothing")
            records[key], begin = value[:-1], end
        return records

    def _decimal(self, text: bytes) -> int:
        if not text.isdigit() or len(text) > 20:
            raise self._broken("has a header that says nothing")
        return int(text)

    def _exactly(self, count: int) -> bytes:
        data = self._stream_piece(count)
        if len(data) < count:
            raise self._broken("is cut off")
        return data

    def _stream_piece(self, count: int) -> bytes:
        """So many bytes, or fewer at the end."""
        try:
            data = self._stream.read(count)
        except (EOFError, zlib.error, gzip.BadGzipFile) as error:
            raise self._broken(f"is cut off or was changed ({error})") from error
        self._read += len(data)
        if self._read > MOST_BYTES:
            raise self._broken(f"unpacks to more than {MOST_BYTES:,} bytes")
        return data

    def _plain(self, name: str) -> str:
        parts = [part for part in name.split("/") if part not in ("", ".")]
        if ".." in parts:
            raise self._broken(f"has a member that leads out of it, {name!a:.80}")
        return "/".join(parts)

    def _broken(self, why: str) -> VerificationError:
        return VerificationError(f"{self._shown}: {why}; get it again, or unpack it and give the adapter's own folder")


class Scratch:
    """A folder for what is unpacked, and where each file in it comes from."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._origins: dict[Path, str] = {}

    def explained(self, text: str) -> str:
        """A message with the places that people know instead of the files in the folder."""
        for path, origin in self._origins.items():
            text = text.replace(str(path), origin)
        return text

    def unpack(self, archive: Path, shown: str, is_wanted: Callable[[str], bool]) -> Files:
        """Write the wanted files of an archive into the folder.

        Args:
            archive: A tar archive, plain or gzipped.
            shown: How messages call the archive.
            is_wanted: Says of a path in the archive whether it is.

        Returns:
            Where each member of the archive lies now, by its path in the archive, in the archive's order.

        Raises:
            VerificationError: It is no such archive, cut off, too large, or leads out of itself.
        """
        found: dict[str, Path | None] = {}
        with archive.open("rb") as raw:
            tar = Tar(_unpacked(raw, shown), shown)
            for member in tar:
                found.pop(member.name, None)  # the later one counts, at its place
                found[member.name] = self._write(tar, member, shown) if is_wanted(member.name) else None
        return found

    def _write(self, tar: Tar, member: Member, shown: str) -> Path | None:
        if not member.is_file:
            return None
        with tempfile.NamedTemporaryFile(dir=self._folder, delete=False) as file:
            for piece in tar.data():
                file.write(piece)
        path = Path(file.name)
        self._origins[path] = f"{shown}, {member.name:.300}"
        return path


def _unpacked(raw: IO[bytes], shown: str) -> IO[bytes]:
    begin = raw.read(8)
    raw.seek(0)
    for mark, way in _PACKED.items():
        if begin.startswith(mark):
            raise VerificationError(
                f"{shown}: is packed with {way}, and plain and gzipped tar archives are read; unpack it, or give the "
                "adapter's own folder"
            )
    return gzip.GzipFile(fileobj=raw) if begin.startswith(_GZIP) else raw  # type: ignore[return-value]
