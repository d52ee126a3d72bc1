"""The folder that OpenVINO keeps compiled models in: what no session has left there is never used."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from edgetune.runtimes import verified_cache
from edgetune.runtimes.verified_cache import VerifiedFolder


def test_files_that_were_not_left_by_a_session_are_removed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with VerifiedFolder(tmp_path / "cache") as folder:
        assert folder is not None
        for age, name in enumerate(("new", "newer", "newest")):
            (folder / name).write_bytes(bytes(10))
            os.utime(folder / name, (age, age))
    (folder / "newest").write_bytes(bytes(9) + b"1")
    (folder / "planted").write_bytes(b"code")
    (folder / "link").symlink_to(folder / "new")
    with VerifiedFolder(folder):
        assert {path.name for path in folder.iterdir()} == {"new", "newer", "sha256.json"}
    monkeypatch.setattr(verified_cache, "MOST_BYTES", 15)
    with VerifiedFolder(folder):
        assert {path.name for path in folder.iterdir()} == {"newer", "sha256.json"}
    (folder / "sha256.json").write_text("[")
    with VerifiedFolder(folder):
        assert {path.name for path in folder.iterdir()} == {"sha256.json"}


@pytest.mark.parametrize("name", ["stray", "sha256.json"])
def test_a_folder_in_the_cache_is_removed(tmp_path: Path, name: str) -> None:
    (tmp_path / "cache" / name / "inner").mkdir(parents=True)
    for _ in range(2):
        with VerifiedFolder(tmp_path / "cache") as folder:
            assert folder is not None
            (folder / "model").write_bytes(b"compiled")
    assert {path.name for path in folder.iterdir()} == {"model", "sha256.json"}


def test_a_link_to_a_folder_is_removed_and_what_it_leads_to_is_left(tmp_path: Path) -> None:
    (tmp_path / "precious").mkdir()
    (tmp_path / "precious" / "file").write_text("kept")
    (tmp_path / "cache").symlink_to(tmp_path / "precious")
    with VerifiedFolder(tmp_path / "cache") as folder:
        assert folder is not None and not folder.is_symlink()
    assert [path.name for path in (tmp_path / "precious").iterdir()] == ["file"]


def test_a_folder_that_cannot_be_verified_is_not_vouched_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with VerifiedFolder(tmp_path / "cache") as folder:
        assert folder is not None
        (folder / "model").write_bytes(b"compiled")
    (folder / "planted").write_bytes(b"code")

    def gone(path: Path) -> str:
        raise FileNotFoundError(path)

    with monkeypatch.context() as patched:
        patched.setattr(verified_cache, "sha256_of", gone)
        unverified = VerifiedFolder(folder)
        assert unverified.__enter__() is None
    unverified.__exit__(None, None, None)
    assert "planted" not in json.loads((folder / "sha256.json").read_text())
    with VerifiedFolder(folder):
        assert {path.name for path in folder.iterdir()} == {"model", "sha256.json"}


def test_a_cache_has_one_session_at_a_time(tmp_path: Path) -> None:
    """What the first one compiled is not in the sums yet, so the second one could only remove it."""
    with VerifiedFolder(tmp_path / "cache") as folder:
        assert folder is not None
        (folder / "first").write_bytes(b"compiled")
        with VerifiedFolder(tmp_path / "cache") as second:
            assert second is None
        assert [path.name for path in folder.iterdir()] == ["first"]
    with VerifiedFolder(tmp_path / "cache"):
        assert {path.name for path in folder.iterdir()} == {"first", "sha256.json"}


def test_where_nothing_can_be_written_nothing_is_kept(tmp_path: Path) -> None:
    (tmp_path / "cache").write_text("in the way")
    with VerifiedFolder(tmp_path / "cache") as folder:
        assert folder is None
