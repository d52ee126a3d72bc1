"""Where the cache lies, for users with and without a home."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest

from edgetune.machine.cache_folder import cache_folder
from edgetune.side_environment import ensure_side_environment
from support.golden import GOLDEN
from support.other_user import AS_USER, USER, needs_another_user
from support.repository import ROOT
from support.small_checkpoint import write_checkpoint


def test_the_cache_folder_can_be_chosen(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(sys, "platform", "linux")
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.delenv("EDGETUNE_CACHE", raising=False)
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    assert cache_folder() == tmp_path / ".cache" / "edgetune"
    monkeypatch.setenv("XDG_CACHE_HOME", "/x")
    assert cache_folder() == Path("/x/edgetune")
    monkeypatch.setenv("XDG_CACHE_HOME", "x")
    assert cache_folder() == tmp_path / ".cache" / "edgetune", "a relative one is to be ignored"
    monkeypatch.setenv("EDGETUNE_CACHE", "/y")
    assert cache_folder() == Path("/y")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("EDGETUNE_CACHE", "y")
    assert cache_folder() == tmp_path / "y"
    monkeypatch.delenv("EDGETUNE_CACHE")
    monkeypatch.setattr(sys, "platform", "darwin")
    assert cache_folder() == tmp_path / "Library" / "Caches" / "edgetune"
    monkeypatch.setattr(sys, "platform", "win32")
    monkeypatch.setenv("LOCALAPPDATA", "/z")
    assert cache_folder() == Path("/z/edgetune")


@pytest.fixture
def scratch() -> Iterator[Path]:
    """Where the other user may write, and keeps temporary files; pytest's own folders are the first user's alone."""
    with TemporaryDirectory() as name:
        folder = Path(name)
        folder.chmod(0o1777)
        shutil.copytree(GOLDEN, folder / "golden", ignore=shutil.ignore_patterns(".cache"))
        yield folder


def edgetune(scratch: Path, *arguments: str | Path, **more: str) -> subprocess.CompletedProcess[str]:
    """Run a command as a user who has no home."""
    homes = {"HOME", "XDG_CACHE_HOME", "EDGETUNE_CACHE"}
    kept = {name: value for name, value in os.environ.items() if name not in homes}
    return subprocess.run(
        [*AS_USER, sys.executable, "-m", "edgetune", *map(str, arguments)],
        cwd=scratch,
        env={**kept, "PYTHONPATH": str(ROOT), "TMPDIR": str(scratch), **more},
        capture_output=True,
        text=True,
        check=False,
    )


def give_side_environment(scratch: Path) -> None:
    """Put this user's side environment into the other user's cache."""
    made = ensure_side_environment(lambda _: None).parents[2]
    cache = scratch / f"edgetune-{USER}"
    cache.mkdir(mode=0o700)
    (cache / "side-environment").symlink_to(made)
    os.chown(cache, USER, USER)


@needs_another_user
def test_doctor_works_without_a_home(scratch: Path) -> None:
    done = edgetune(scratch, "doctor")
    assert (done.returncode, done.stderr) == (0, "")
    assert f"free ({scratch / f'edgetune-{USER}'})" in done.stdout
    assert (scratch / f"edgetune-{USER}").stat().st_mode & 0o777 == 0o700


@needs_another_user
def test_prepare_and_ort_training_work_without_a_home(scratch: Path) -> None:
    give_side_environment(scratch)
    source = write_checkpoint(scratch / "source" / "tiny")
    bundle = scratch / "bundle"
    small = ["--rank", "2", "--max-length", "64"]
    done = edgetune(scratch, "prepare", source, "--output", bundle, "--base", "fp32", *small)
    assert done.returncode == 0, done.stderr
    data = ["--data", scratch / "golden" / "train.jsonl", "--steps", "1"]
    done = edgetune(scratch, "train", bundle, *data, "--runtime", "ort-training", "--output", scratch / "adapter")
    assert done.returncode == 0, done.stderr
    assert not list(scratch.glob("~*")), "no library takes a home of this name"


@needs_another_user
@pytest.mark.parametrize("kind", ["another user's", "open to others", "a link"])
def test_a_cache_that_is_not_the_users_own_is_refused(scratch: Path, kind: str) -> None:
    cache = scratch / f"edgetune-{USER}"
    if kind == "a link":
        (scratch / "elsewhere").mkdir()
        cache.symlink_to(scratch / "elsewhere")
        os.chown(cache, USER, USER, follow_symlinks=False)
    else:
        cache.mkdir()
        cache.chmod(0o777 if kind == "open to others" else 0o755)
        os.chown(cache, *((USER, USER) if kind == "open to others" else (0, 0)))
    done = edgetune(scratch, "doctor")
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == (
        f"error: {cache} is not a folder that only this user can open: this user has no home; set HOME, or name a "
        "folder of yours in EDGETUNE_CACHE\n"
    )


@needs_another_user
@pytest.mark.parametrize("home", ["/", "/nonexistent", "there"])
def test_a_home_that_cannot_be_written_leads_to_the_variable(scratch: Path, home: str) -> None:
    if home == "there":
        # The folder was made by root once, who ran it with this user's home.
        (scratch / "there" / ".cache" / "edgetune" / "side-environment").mkdir(parents=True)
        home = str(scratch / "there")
    golden = scratch / "golden"
    run = ["train", golden / "bundle", "--data", golden / "train.jsonl", "--output", scratch / "a", "--steps", "1"]
    done = edgetune(scratch, *run, "--runtime", "ort-training", HOME=home)
    assert done.returncode == 2, done.stderr
    assert "cannot be written (Permission denied); name a folder of yours in EDGETUNE_CACHE" in done.stderr
    assert edgetune(scratch, "doctor", HOME=home).returncode == 0
