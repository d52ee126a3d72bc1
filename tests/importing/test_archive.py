"""Tar archives against Python's own library, and those that somebody made to do harm."""

from __future__ import annotations

import gzip
import io
import tarfile
import zipfile
from pathlib import Path

import numpy as np
import pytest

from edgetune.errors import VerificationError
from edgetune.importing import archive
from edgetune.importing.archive import Scratch, Tar
from support.foreign_adapters import tar_of

LONG = "/".join(["a-folder-with-a-long-name"] * 8) + "/file"


def everything(path: Path, folder: Path) -> dict[str, bytes | None]:
    folder.mkdir()
    found = Scratch(folder).unpack(path, "it", lambda _: True)
    return {name: None if at is None else at.read_bytes() for name, at in found.items()}


def written(path: Path, data: bytes) -> Path:
    path.write_bytes(data)
    return path


@pytest.mark.parametrize("form", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
@pytest.mark.parametrize("gzipped", [False, True])
def test_members_are_those_of_pythons_library(tmp_path: Path, form: int, gzipped: bool) -> None:
    generator = np.random.default_rng(0)
    files: dict[str, bytes | Path] = {
        f"data/{size}": generator.bytes(size) for size in (0, 1, 511, 512, 513, 3_000_000)
    }
    files[LONG if form != tarfile.USTAR_FORMAT else LONG[-90:]] = b"far down"
    if form == tarfile.PAX_FORMAT:
        files["Müller.txt"] = b"in UTF-8"
    path = written(tmp_path / "it.tar", tar_of(files, gzipped=gzipped, format=form))
    assert everything(path, tmp_path / "out") == files


def test_what_is_no_file_is_not_made(tmp_path: Path) -> None:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as made:
        for name, kind in [("link", tarfile.SYMTYPE), ("hard", tarfile.LNKTYPE), ("pipe", tarfile.FIFOTYPE),
                           ("folder", tarfile.DIRTYPE), ("device", tarfile.CHRTYPE)]:  # fmt: skip
            member = tarfile.TarInfo(name)
            member.type, member.linkname = kind, "/etc/passwd"
            made.addfile(member)
        last = tarfile.TarInfo("./last")
        last.size = 4
        made.addfile(last, io.BytesIO(b"here"))
    found = everything(written(tmp_path / "it.tar", buffer.getvalue()), tmp_path / "out")
    assert found == {**dict.fromkeys(["link", "hard", "pipe", "folder", "device"]), "last": b"here"}


@pytest.mark.parametrize("name", ["../outside", "data/../../outside", "a/.."])
def test_a_name_that_leads_out_is_refused(tmp_path: Path, name: str) -> None:
    with pytest.raises(VerificationError, match="a member that leads out of it"):
        everything(written(tmp_path / "it.tar", tar_of({name: b"x"})), tmp_path / "out")
    assert not (tmp_path / "outside").exists()


def test_absolute_names_are_names_in_the_archive(tmp_path: Path) -> None:
    assert everything(written(tmp_path / "it.tar", tar_of({"/data/x": b"x"})), tmp_path / "out") == {"data/x": b"x"}


def test_the_last_of_two_members_of_one_name_counts(tmp_path: Path) -> None:
    first, second = (tar_of({"x": content}) for content in (b"first", b"second"))
    assert everything(written(tmp_path / "it.tar", first[:1024] + second), tmp_path / "out") == {"x": b"second"}


@pytest.mark.parametrize("gzipped", [False, True])
def test_every_cut_is_found(tmp_path: Path, gzipped: bool) -> None:
    whole = tar_of({"x": b"x" * 700, "y": b"y" * 30}, gzipped=gzipped, format=tarfile.USTAR_FORMAT)
    # A header and two blocks, a header and one; then comes the first of the two blocks of zeros that end it.
    ends = len(whole) if gzipped else 5 * 512
    cuts = range(ends) if gzipped else sorted({*range(0, ends, 97), 511, 512, 513, ends - 1})
    for cut in cuts:
        (tmp_path / "out").mkdir(exist_ok=True)
        with pytest.raises(VerificationError, match=r"is cut off|is no tar archive"):
            Scratch(tmp_path / "out").unpack(written(tmp_path / "it.tar", whole[:cut]), "it", lambda _: True)


def test_flipped_bits_of_headers_are_found(tmp_path: Path) -> None:
    whole = tar_of({"adapter": b"x" * 40})
    generator = np.random.default_rng(3)
    (tmp_path / "out").mkdir()
    for _ in range(200):
        changed = bytearray(whole)
        place = int(generator.integers(510))  # what stands behind the digits of the sum says nothing
        changed[place + 2 * (place >= 154)] ^= 1 << int(generator.integers(8))
        with pytest.raises(VerificationError):
            Scratch(tmp_path / "out").unpack(written(tmp_path / "it.tar", bytes(changed)), "it", lambda _: True)


def test_flipped_bits_of_gzipped_data_are_found(tmp_path: Path) -> None:
    whole = bytearray(tar_of({"x": np.random.default_rng(0).bytes(5000)}, gzipped=True))
    whole[len(whole) // 2] ^= 1
    with pytest.raises(VerificationError, match="was changed"):
        everything(written(tmp_path / "it.tar", bytes(whole)), tmp_path / "out")


def header(name: str = "x", size: bytes = b"00000000000", kind: bytes = b"0") -> bytes:
    """A header as somebody might forge one, with its right sum."""
    block = bytearray(512)
    block[: len(name)] = name.encode()
    block[124:136] = size.ljust(12, b"\0")
    block[156:157] = kind
    block[257:263] = b"ustar\0"
    block[148:156] = b" " * 8
    block[148:156] = b"%06o\0 " % sum(block)
    return bytes(block)


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        pytest.param(header(kind=b"x", size=b"77777777777"), "has a header of 8,589,934,591 bytes", id="long header"),
        pytest.param(header(kind=b"L", size=b"\x80" + b"\xff" * 11), "has a header of", id="longer still"),
        pytest.param(header(size=b"\xff" * 12), "is no tar archive", id="negative size"),
        pytest.param(header(size=b"-1"), "is no tar archive", id="minus"),
        pytest.param(header(size=b"77777777777"), "is cut off", id="size without bytes"),
        pytest.param(header(kind=b"x", size=b"24") + b"20 size=-512".ljust(512, b"\n"), "says nothing", id="pax minus"),
        pytest.param(header(kind=b"x", size=b"24") + b"0 path=x\n".ljust(512, b"\0"), "says nothing", id="no length"),
        pytest.param(header(kind=b"x", size=b"24") + b"999 path=x\n".ljust(512, b"\0"), "says nothing", id="too long"),
        pytest.param(b"", "is cut off", id="empty"),
        pytest.param(b"not a tar archive" * 99, "is no tar archive", id="text"),
    ],
)
def test_forged_archives_are_refused(tmp_path: Path, data: bytes, reason: str) -> None:
    with pytest.raises(VerificationError, match=reason):
        everything(written(tmp_path / "it.tar", data), tmp_path / "out")


def test_what_unpacks_to_more_than_is_reasonable_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Even where nothing of it is wanted: it would only take time."""
    monkeypatch.setattr(archive, "MOST_BYTES", 10_000_000)
    bomb = written(tmp_path / "it.tar.gz", tar_of({"x": bytes(20_000_000)}, gzipped=True))
    assert bomb.stat().st_size < 100_000
    with pytest.raises(VerificationError, match="unpacks to more than 10,000,000 bytes"):
        Scratch(tmp_path).unpack(bomb, "it", lambda _: False)
    # What follows the archive is read for gzip's sum alone, and counts.
    with pytest.raises(VerificationError, match="unpacks to more than"):
        Scratch(tmp_path).unpack(written(bomb, gzip.compress(tar_of({}) + bytes(20_000_000))), "it", lambda _: False)


def test_many_members_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(archive, "MOST_HEADERS", 100)
    path = written(tmp_path / "it.tar", tar_of({f"{number}": b"" for number in range(101)}))
    with pytest.raises(VerificationError, match="has more than 100 headers"):
        Scratch(tmp_path).unpack(path, "it", lambda _: False)


def test_headers_about_others_are_counted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A gzipped archive of a few megabytes may hold gigabytes of them, which would take hours to read."""
    monkeypatch.setattr(archive, "MOST_HEADERS", 1000)
    monkeypatch.setattr(archive, "_MOST_TEXT", 200_000)
    records = b"5 a=\n" * 10_000
    about = header(kind=b"x", size=b"%o" % len(records)) + records + bytes(-len(records) % 512)
    for data, reason in [(about * 5, "headers of more than 200,000"), (header(kind=b"x") * 1001, "1,000 headers")]:
        with pytest.raises(VerificationError, match=f"has .*{reason}"):
            Scratch(tmp_path).unpack(written(tmp_path / "it.tar", data), "it", lambda _: False)


@pytest.mark.parametrize(
    ("data", "way"),
    [(b"\x28\xb5\x2f\xfd" + bytes(99), "zstd"), (b"BZh9" + bytes(99), "bzip2"), (b"\xfd7zXZ" + bytes(99), "xz")],
)
def test_other_ways_of_packing_are_named(tmp_path: Path, data: bytes, way: str) -> None:
    with pytest.raises(VerificationError, match=f"is packed with {way}, and plain and gzipped"):
        everything(written(tmp_path / "it", data), tmp_path / "out")


def test_a_zip_is_named(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "it.zip", "w") as made:
        made.writestr("x", "x")
    with pytest.raises(VerificationError, match="is packed with zip"):
        everything(tmp_path / "it.zip", tmp_path / "out")


def test_data_is_taken_in_pieces() -> None:
    tar = Tar(io.BytesIO(tar_of({"x": bytes(3 << 20)})), "it")
    for member in tar:
        assert (member.name, member.is_file) == ("x", True)
        assert [len(piece) for piece in tar.data()] == [1 << 20] * 3


def test_a_message_names_the_place_that_people_know(tmp_path: Path) -> None:
    scratch = Scratch(tmp_path)
    found = scratch.unpack(written(tmp_path / "it.tar", tar_of({"data/x": b"x", "y": b"y"})), "it.tar", lambda _: True)
    assert scratch.explained(f"{found['data/x']}: is broken") == "it.tar, data/x: is broken"
