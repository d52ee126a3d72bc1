"""Disks that are too small or fill up: exit code 6 with figures, nothing half written, nothing lost that was learnt."""

from __future__ import annotations

import errno
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from edgetune.cli.failures import exit_code_of
from edgetune.errors import NoRoomError, ResourceError
from edgetune.formats.adapter import MOST_LINE_BYTES, RECORD, most_bytes, read_adapter, write_adapter
from edgetune.formats.bundle import load_bundle
from edgetune.formats.storage import atomic_folder, write_file
from edgetune.machine import disk as room
from edgetune.machine.disk import reserve
from edgetune.model.lora import initial_parameters
from edgetune.training.observer import StepMetrics
from edgetune.training.record import RunRecord
from support.golden import GOLDEN
from support.mounts import needs_mounts
from support.repository import ROOT
from support.shared_material import shared_material
from support.small_checkpoint import write_checkpoint

ENVIRONMENT = {**os.environ, "PYTHONPATH": str(ROOT)}
FIGURES = r"[\d,]+ bytes (that were written )?are needed, [\d,]+ are free now"


def edgetune(*arguments: str | Path, before: list[str] | None = None, cwd: Path | None = None) -> tuple[int, str]:
    """Exit code and stderr of a command."""
    command = [*(before or []), sys.executable, "-m", "edgetune", *map(str, arguments)]
    done = subprocess.run(command, cwd=cwd, env=ENVIRONMENT, capture_output=True, text=True, timeout=300, check=False)
    assert "Traceback" not in done.stderr
    return done.returncode, done.stderr


def on_disk_of(folder: Path, size: str) -> list[str]:
    """Before a command that is run in `folder`: `small` there is a disk of its own."""
    return ["unshare", "-m", "bash", str(shared_material() / "cases" / "full.sh"), size]


def train(output: Path | str, steps: int = 2) -> list[str | Path]:
    data = ["--data", GOLDEN / "train.jsonl", "--output", output, "--steps", str(steps)]
    return ["train", GOLDEN / "bundle", *data, "--runtime", "onnxruntime"]


# --- before the first step


@needs_mounts
def test_training_without_room_ends_before_the_first_step(tmp_path: Path) -> None:
    code, stderr = edgetune(*train("small/adapter"), before=on_disk_of(tmp_path, "48k"), cwd=tmp_path)
    assert code == exit_code_of(ResourceError), stderr
    assert "step 1" not in stderr
    found = re.search(r"small/adapter: the disk is full: ([\d,]+) bytes are needed, ([\d,]+) are free now", stderr)
    assert found is not None, stderr
    needed, free = (int(figure.replace(",", "")) for figure in found.groups())
    assert needed == sum(most_bytes(load_bundle(GOLDEN / "bundle").manifest.lora, 2).values()) > free > 0
    assert free < 48 << 10


@needs_mounts
def test_what_is_said_to_be_needed_is_enough(tmp_path: Path) -> None:
    needed = sum(most_bytes(load_bundle(GOLDEN / "bundle").manifest.lora, 2).values())
    # The lock and the ends of files take whole pages.
    size = f"{needed // 1024 + 24}k"
    assert edgetune(*train("small/adapter"), before=on_disk_of(tmp_path, size), cwd=tmp_path)[0] == 0


@pytest.mark.skipif(sys.platform == "win32", reason="Windows limits no file's size")
def test_a_file_that_is_too_large_for_its_file_system_is_refused_before_the_first_step(tmp_path: Path) -> None:
    limited = ["bash", "-c", 'ulimit -f 16; exec "$@"', "bash"]
    code, stderr = edgetune(*train(tmp_path / "adapter"), before=limited)
    assert code == exit_code_of(ResourceError), stderr
    assert "step 1" not in stderr
    assert f"a file is larger than its file system, or `ulimit -f` with {16 << 10:,} bytes, allows" in stderr
    assert re.search(FIGURES, stderr)
    assert list(tmp_path.iterdir()) == []


# --- a disk that fills up, or fails, while the run goes on


FILLING = """
import errno, os, sys, tempfile
from pathlib import Path
from edgetune.cli.failures import failure_of
from edgetune.config import TrainConfig
from edgetune.training import train


class Observer:
    def on_start(self, info): pass
    def on_validation(self, step, loss): pass
    def on_notice(self, text): print("notice", text)
    def on_step(self, metrics):
        if metrics.step == 2:
            {event}


def fill():
    # Another program takes all that is left.
    with open("small/other", "wb", buffering=0) as file:
        try:
            while True:
                file.write(bytes(4096))
        except OSError as error:
            assert error.errno == errno.ENOSPC


def take_room_back():
    # As on a file system that keeps no room: what was kept is another program's now.
    for path in Path("small").glob(".adapter.partial-*/*"):
        os.truncate(path, 0)
    fill()

config = TrainConfig(steps=4, runtime="onnxruntime")
golden = Path(sys.argv[1])
tempfile.gettempdir()
try:
    train(golden / "bundle", golden / "train.jsonl", "small/adapter", config, observer=Observer())
except Exception as error:
    failure = failure_of(error)
    print("exit code", failure.code)
    print(failure.message)
"""


def run_while(tmp_path: Path, event: str, **environment: str) -> str:
    """What a run says on whose disk something happens after its second step."""
    script = tmp_path / "script.py"
    script.write_text(FILLING.format(event=event))
    done = subprocess.run(
        # The disk goes with the process: what is on it is copied out.
        [*on_disk_of(tmp_path, "400k"), "bash", "-c", '"$@"; cp -r small copy', "bash", sys.executable, script, GOLDEN],
        cwd=tmp_path,
        env={**ENVIRONMENT, **environment},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.stderr == ""
    return done.stdout


def steps_in(adapter: Path) -> int:
    """An adapter is whole, and so many steps went into it."""
    manifest = load_bundle(GOLDEN / "bundle").manifest
    read_adapter(adapter, manifest.lora, manifest.base, manifest.tokenizer)
    return int(json.loads((adapter / "edgetune.json").read_text())["provenance"]["steps"])


@needs_mounts
def test_what_was_reserved_is_written_to_a_disk_that_others_fill(tmp_path: Path) -> None:
    said = run_while(tmp_path, "fill()")
    assert "exit code" not in said
    assert "notice" not in said
    assert steps_in(tmp_path / "copy" / "adapter") == 4
    lines = (tmp_path / "copy" / "adapter" / RECORD).read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines] == [1, 2, 3, 4]


@needs_mounts
def test_what_was_learnt_goes_elsewhere_when_its_disk_has_no_room_after_all(tmp_path: Path) -> None:
    (tmp_path / "scratch").mkdir()
    said = run_while(tmp_path, "take_room_back()", TMPDIR=str(tmp_path / "scratch"))
    assert f"notice {RECORD} ends before step 2: No space left on device; the training goes on" in said
    assert "exit code 6\n" in said
    assert re.search(FIGURES, said)
    saved = re.search(r"what was learnt is in (\S+/adapter): move it to where it shall be", said)
    assert saved is not None, said
    assert Path(saved[1]).is_relative_to(tmp_path / "scratch")
    assert Path(saved[1]).parent.stat().st_mode & 0o777 == 0o700
    assert steps_in(Path(saved[1])) == 4
    assert [path.name for path in (tmp_path / "copy").iterdir()] == ["other"], "nothing half written is left"


@needs_mounts
def test_the_current_folder_is_the_second_choice(tmp_path: Path) -> None:
    # Temporary files lie on the same disk.
    said = run_while(tmp_path, "take_room_back()", TMPDIR=str(tmp_path / "small"))
    assert "exit code 6\n" in said
    saved = re.search(r"what was learnt is in (\S+/adapter)", said)
    assert saved is not None, said
    assert Path(saved[1]).parent.parent == tmp_path
    assert steps_in(Path(saved[1])) == 4
    assert [path.name for path in (tmp_path / "copy").iterdir()] == ["other"], "nothing half written is left"


@needs_mounts
def test_what_no_folder_takes_is_said_to_be_lost(tmp_path: Path) -> None:
    event = "take_room_back(); os.chdir('small')"
    said = run_while(tmp_path, event, TMPDIR=str(tmp_path / "small"))
    assert "exit code 6\n" in said
    assert f"what was learnt is lost: {tmp_path}/small take it neither" in said


@needs_mounts
def test_what_was_learnt_goes_elsewhere_when_its_folder_is_gone(tmp_path: Path) -> None:
    event = "import shutil; shutil.rmtree('small', ignore_errors=True)"
    (tmp_path / "scratch").mkdir()
    said = run_while(tmp_path, event, TMPDIR=str(tmp_path / "scratch"))
    assert "exit code 1\n" in said or "exit code 2\n" in said, said
    saved = re.search(r"what was learnt is in (\S+/adapter)", said)
    assert saved is not None, said
    assert steps_in(Path(saved[1])) == 4


# --- the other commands


@needs_mounts
@pytest.mark.parametrize("kind", ["bundle", "split", "merge", "int4", "keep"])
def test_every_size_of_disk_is_enough_or_refused(tmp_path: Path, kind: str) -> None:
    manifest = load_bundle(GOLDEN / "bundle").manifest
    (tmp_path / "adapter").mkdir()
    write_adapter(
        tmp_path / "adapter",
        base=manifest.base,
        tokenizer=manifest.tokenizer,
        lora=manifest.lora,
        parameters=initial_parameters(manifest.lora, 0),
        provenance={},
    )
    arguments: list[str | Path] = {
        "bundle": ["bundle", GOLDEN / "bundle", "--target", "linux-arm64"],
        "split": ["split", GOLDEN / "bundle", "--data", GOLDEN / "train.jsonl"],
        "merge": ["export", GOLDEN / "bundle", "--adapter", "adapter"],
        "int4": ["export", GOLDEN / "bundle", "--adapter", "adapter", "--precision", "int4", "--unmeasured"],
        "keep": ["export", GOLDEN / "bundle", "--adapter", "adapter", "--keep-adapter"],
    }[kind]
    codes = set()
    for size in ("64k", "512k", "700k", "800k", "1m", "1200k", "1600k", "8m"):
        before = on_disk_of(tmp_path, size)
        code, stderr = edgetune(*arguments, "--output", "small/output", before=before, cwd=tmp_path)
        codes.add(code)
        assert code in (0, exit_code_of(ResourceError)), (size, stderr)
        if code:
            assert re.search(FIGURES, stderr), (size, stderr)
            assert "internal error" not in stderr
        elif codes == {0}:
            raise AssertionError("the smallest was enough")
    assert codes == {0, exit_code_of(ResourceError)}


@needs_mounts
def test_preparing_without_room_ends_before_it_begins(tmp_path: Path) -> None:
    write_checkpoint(tmp_path / "tiny")
    arguments = ["prepare", "tiny", "--output", "small/bundle", "--base", "fp32", "--rank", "2", "--max-length", "64"]
    code, stderr = edgetune(*arguments, before=on_disk_of(tmp_path, "64k"), cwd=tmp_path)
    assert code == exit_code_of(ResourceError), stderr
    assert re.search(FIGURES, stderr)
    assert "Building" not in stderr
    for size in ("200k", "400k", "640k"):
        code, stderr = edgetune(*arguments, before=on_disk_of(tmp_path, size), cwd=tmp_path)
        assert code == exit_code_of(ResourceError), (size, stderr)
        assert re.search(FIGURES, stderr), (size, stderr)


# --- reserving


def test_reserved_room_is_on_the_disk_and_what_is_written_ends_where_it_ends(tmp_path: Path) -> None:
    with atomic_folder(tmp_path / "a") as folder:
        reserve(folder, {"large": 3 << 20, "empty": 0}, tmp_path / "a")
        status = (folder / "large").stat()
        assert status.st_blocks * 512 >= 3 << 20
        write_file(folder / "large", b"short")
        write_file(folder / "empty", b"longer")
    assert (tmp_path / "a" / "large").read_bytes() == b"short"
    assert (tmp_path / "a" / "empty").read_bytes() == b"longer"


def test_a_file_system_that_allocates_nothing_ahead_is_written_to(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def not_offered(*_: int) -> None:
        raise OSError(errno.EOPNOTSUPP, "Operation not supported")

    monkeypatch.setattr(os, "posix_fallocate", not_offered)
    reserve(tmp_path, {"x": (1 << 20) + 1}, tmp_path)
    assert (tmp_path / "x").stat().st_blocks * 512 > 1 << 20


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT, errno.EFBIG])
def test_room_that_cannot_be_taken_is_said_in_bytes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    def refuse(*_: int) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(os, "posix_fallocate", refuse)
    with pytest.raises(NoRoomError, match=r"output: .*: 1,234,567 bytes are needed, [\d,]+ are free now"):
        reserve(tmp_path, {"x": 1_234_500, "y": 67}, tmp_path / "output")


def test_a_failing_disk_is_no_lack_of_room(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: int) -> None:
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(os, "posix_fallocate", fail)
    with pytest.raises(OSError, match="Input/output"):
        reserve(tmp_path, {"x": 1}, tmp_path)


def test_temporary_files_on_another_disk_are_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert "for temporary files" not in str(room.no_room(tmp_path / "a", 1 << 60))
    if not Path("/dev/shm").is_dir() or Path("/dev/shm").stat().st_dev == tmp_path.stat().st_dev:
        pytest.skip("there is one disk only")
    monkeypatch.setattr("tempfile.tempdir", "/dev/shm")
    assert re.search(r"are free now, [\d,]+ in /dev/shm for temporary files;", str(room.no_room(tmp_path / "a", 1)))


def test_no_file_of_an_adapter_takes_more_than_is_said(tmp_path: Path) -> None:
    manifest = load_bundle(GOLDEN / "bundle").manifest
    write_adapter(
        tmp_path,
        base=manifest.base,
        tokenizer=manifest.tokenizer,
        lora=manifest.lora,
        parameters=initial_parameters(manifest.lora, 0),
        provenance={f"key {number}": "x" * 100 for number in range(100)},
    )
    most_of_all = most_bytes(manifest.lora)
    del most_of_all[RECORD]
    for name, most in most_of_all.items():
        assert (tmp_path / name).stat().st_size <= most, name


def test_no_line_of_a_record_takes_more_than_is_said(tmp_path: Path) -> None:
    longest = -sys.float_info.min
    with RunRecord(tmp_path, print) as record:
        metrics = StepMetrics(10**9, longest, longest, longest, 10**9, longest, 10**12, 0.0, longest, 10**12)
        record.write(metrics, validation_loss=longest, initial_validation_loss=longest)
        record.write(metrics, validation_loss=longest)
    first, second = (tmp_path / RECORD).read_bytes().splitlines(keepends=True)
    assert len(second) <= MOST_LINE_BYTES
    assert len(first) <= 2 * MOST_LINE_BYTES
