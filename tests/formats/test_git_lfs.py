"""Pointers of Git LFS."""

from __future__ import annotations

from pathlib import Path

import pytest

from edgetune.errors import VerificationError
from edgetune.formats.git_lfs import refuse_pointers, size_behind
from support.small_checkpoint import POINTER


def test_a_pointer_says_how_large_the_file_is(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(POINTER)
    assert size_behind(tmp_path / "a") == 4972489328
    lines = POINTER.splitlines(keepends=True)
    (tmp_path / "a").write_bytes(b"".join([lines[0], b"ext-0-foo sha256:00\n", *lines[1:]]))
    assert size_behind(tmp_path / "a") == 4972489328


NO_SIZE = POINTER.replace(b"size", b"")


@pytest.mark.parametrize("data", [b"", POINTER[:40], b"\n" + POINTER, bytes(2000) + POINTER, NO_SIZE])
def test_other_files_are_none(tmp_path: Path, data: bytes) -> None:
    (tmp_path / "a").write_bytes(data)
    assert size_behind(tmp_path / "a") is None
    refuse_pointers([tmp_path / "a", tmp_path / "absent", tmp_path])


def test_all_pointers_are_named_at_once(tmp_path: Path) -> None:
    paths = [tmp_path / name for name in ("a", "b", "c")]
    for path in paths:
        path.write_bytes(POINTER)
    (tmp_path / "b").write_text("{}")
    with pytest.raises(VerificationError) as caught:
        refuse_pointers(paths)
    first, last, fix = str(caught.value).splitlines()
    assert (str(paths[0]) in first, str(paths[2]) in last, "git lfs pull" in fix) == (True, True, True)
