"""Writing folders: whole or not there, whatever happens at any operation on the disk."""

from __future__ import annotations

import builtins
import errno
import io
import itertools
import json
import os
import shutil
import signal
import stat
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import pytest

from edgetune.cli.failures import exit_code_of
from edgetune.errors import EdgetuneError, LockedError, NoRoomError, UsageError
from edgetune.formats import storage
from edgetune.formats.storage import atomic_file, atomic_folder, locked, recover, require_unicode, sha256_of, write_file

OLD = {"manifest.json": b"old", "weights": b"old" * 999}
NEW = {"manifest.json": b"new", "weights": b"new" * 999, "deep/er/file": b"new"}


def fill(folder: Path, files: dict[str, bytes]) -> None:
    for name, data in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        write_file(folder / name, data)


def write(path: Path, files: dict[str, bytes] = NEW, *, replace: bool = False) -> None:
    with atomic_folder(path, replace=replace) as folder:
        fill(folder, files)


def content(path: Path) -> dict[str, bytes] | None:
    """What a reader finds; None when there is nothing."""
    if not path.exists():
        return None
    return {file.relative_to(path).as_posix(): file.read_bytes() for file in path.rglob("*") if file.is_file()}


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def make_old(path: Path) -> None:
    path.mkdir(parents=True)
    fill(path, OLD)


# --- names


@pytest.mark.parametrize("name", [b"caf\xe9", b"caf\xe9/inside", b"\xed\xa0\x80"])
def test_a_path_that_is_not_unicode_is_refused_for_reading_and_writing(tmp_path: Path, name: bytes) -> None:
    path = tmp_path / os.fsdecode(name)
    with pytest.raises(UsageError, match="the folder's path is not valid Unicode; rename it"):
        recover(path)
    with pytest.raises(UsageError, match="not valid Unicode"), atomic_folder(path):
        pytest.fail("it was begun")
    assert list(tmp_path.iterdir()) == []
    path.mkdir(parents=True)
    (tmp_path / "link").symlink_to(path)
    with pytest.raises(UsageError, match="not valid Unicode"):
        recover(tmp_path / "link")
    (path / "file").write_text("")
    with pytest.raises(UsageError, match="the file's path is not valid Unicode; rename it"):
        require_unicode(path / "file")


@pytest.mark.parametrize("name", ["café", "日本", "\ufffd", "a b"])
def test_any_name_in_unicode_is_taken(tmp_path: Path, name: str) -> None:
    write(tmp_path / name)
    recover(tmp_path / name)
    assert content(tmp_path / name) == NEW


# --- what happens on the disk, operation by operation


@contextmanager
def watched(before: Callable[[str, Path], None]) -> Iterator[None]:
    """Call `before(operation, path)` before every operation that changes the disk or makes it durable."""
    sync, opens = os.fsync, {os: os.open, io: io.open, builtins: builtins.open}
    changes = {name: getattr(os, name) for name in ("rename", "replace", "mkdir", "unlink", "rmdir")}

    def changing(name: str) -> Callable[..., Any]:
        def operation(path: Any, *arguments: Any, **options: Any) -> Any:
            before(name, Path(path))
            return changes[name](path, *arguments, **options)

        return operation

    def fsync(handle: int) -> None:
        before("fsync", Path(f"/proc/self/fd/{handle}").readlink())
        sync(handle)

    def opening(module: Any) -> Callable[..., Any]:
        def operation(path: Any, mode: Any = "r", *arguments: Any, **options: Any) -> Any:
            if mode & (os.O_WRONLY | os.O_RDWR) if isinstance(mode, int) else set(mode) & set("wax+"):
                before("open", Path(path))
            return opens[module](path, mode, *arguments, **options)

        return operation

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "fsync", fsync)
        for name in changes:
            patch.setattr(os, name, changing(name))
        for module in opens:
            patch.setattr(module, "open", opening(module))
        yield


def operations(path: Path, **options: bool) -> list[tuple[str, Path]]:
    seen: list[tuple[str, Path]] = []
    with watched(lambda name, place: seen.append((name, place))):
        write(path, **options)
    return seen


linux = pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")


# --- writing


def test_a_folder_appears_when_the_block_ends(tmp_path: Path) -> None:
    path = tmp_path / "a" / "b"
    with atomic_folder(path) as folder:
        fill(folder, NEW)
        assert not path.exists()
        assert folder.parent == path.parent
        assert folder.name.startswith(".b.partial-")
    assert content(path) == NEW
    assert names(path.parent) == ["b"]


@pytest.mark.parametrize("replace", [False, True])
@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt, SystemExit])
def test_an_exception_leaves_what_was_there(tmp_path: Path, error: type[BaseException], replace: bool) -> None:
    path = tmp_path / "a"
    if replace:
        make_old(path)

    def fail() -> None:
        with atomic_folder(path, replace=replace) as folder:
            fill(folder, NEW)
            raise error

    with pytest.raises(error):
        fail()
    assert content(path) == (OLD if replace else None)
    assert names(tmp_path) == (["a"] if replace else [])


def test_an_existing_output_stays_unless_it_is_to_be_replaced(tmp_path: Path) -> None:
    make_old(tmp_path / "a")
    with pytest.raises(UsageError, match=r"a already exists; choose another output or add --force"):
        write(tmp_path / "a")
    assert content(tmp_path / "a") == OLD
    write(tmp_path / "a", replace=True)
    assert content(tmp_path / "a") == NEW
    assert names(tmp_path) == ["a"]


def test_a_file_is_never_replaced_by_a_folder(tmp_path: Path) -> None:
    (tmp_path / "train.jsonl").write_text("{}")
    with pytest.raises(UsageError, match="is a file"):
        write(tmp_path / "train.jsonl", replace=True)
    assert (tmp_path / "train.jsonl").read_text() == "{}"


def test_a_folder_without_the_marker_is_never_replaced(tmp_path: Path) -> None:
    documents = tmp_path / "documents"
    documents.mkdir()
    with atomic_folder(documents, replace=True, marker="manifest.json") as folder:
        fill(folder, OLD)  # an empty one may go …
    with atomic_folder(documents, replace=True, marker="manifest.json") as folder:
        fill(folder, NEW)  # … and one of ours
    (documents / "manifest.json").unlink()
    with (
        pytest.raises(UsageError, match=r"documents holds something else \(no manifest.json\)"),
        atomic_folder(documents, replace=True, marker="manifest.json"),
    ):
        raise AssertionError("not reached")
    assert "weights" in names(documents)


def test_what_appears_meanwhile_is_not_replaced(tmp_path: Path) -> None:
    path = tmp_path / "a"

    def run() -> None:
        with atomic_folder(path) as folder:
            fill(folder, NEW)
            make_old(path)  # by someone who knows nothing of the lock

    with pytest.raises(UsageError, match="cannot be written"):
        run()
    assert content(path) == OLD
    assert names(tmp_path) == ["a"]


def test_a_link_leads_to_the_folder_that_is_written(tmp_path: Path) -> None:
    make_old(tmp_path / "real" / "v1")
    link = tmp_path / "current"
    link.symlink_to(tmp_path / "real" / "v1")
    write(link, replace=True)
    assert link.is_symlink()
    assert content(tmp_path / "real" / "v1") == NEW
    assert names(tmp_path / "real") == ["v1"]


def test_the_umask_holds(tmp_path: Path) -> None:
    previous = os.umask(0o077)
    try:
        write(tmp_path / "private")
    finally:
        os.umask(previous)
    assert stat.S_IMODE((tmp_path / "private").stat().st_mode) == 0o700


@pytest.mark.parametrize("name", ["a", "model[1]", "*", "?"])
def test_stale_partial_folders_go_and_those_of_others_stay(tmp_path: Path, name: str) -> None:
    stale = tmp_path / f".{name}.partial-0123abcd"
    others = [".other.partial-0123abcd", ".model1.partial-0123abcd", f"{name}.partial-0123abcd"]
    for folder in [stale, *(tmp_path / other for other in others)]:
        make_old(folder)
    write(tmp_path / name)
    assert content(tmp_path / name) == NEW
    assert names(tmp_path) == sorted([*others, name])


@linux
def test_everything_is_durable_before_it_is_named(tmp_path: Path) -> None:
    path = tmp_path / "a"
    make_old(path)
    seen = operations(path, replace=True)
    renames = [index for index, (name, _) in enumerate(seen) if name == "rename"]
    aside, into_place, discarded = renames
    partial = seen[into_place][1]
    assert seen[aside][1] == path
    assert seen[discarded][1].name == ".a.previous"
    for name in NEW:
        written = [index for index, event in enumerate(seen) if event == ("open", partial / name)]
        synced = [index for index, event in enumerate(seen) if event == ("fsync", partial / name)]
        assert written, name
        assert written[-1] < synced[-1] < aside, name
    for folder in [partial, partial / "deep", partial / "deep" / "er"]:
        made = seen.index(("mkdir", folder))
        entries = [
            index for index, (name, place) in enumerate(seen[:aside]) if place.parent == folder and name != "fsync"
        ]
        synced = [index for index, event in enumerate(seen) if event == ("fsync", folder)]
        assert made < max(entries, default=made + 1) < synced[-1] < aside, folder
    assert ("fsync", tmp_path) in seen[into_place:discarded], "the new name is durable before the old folder goes"


# --- kills


def kill_everywhere(root: Path, replace: bool) -> list[dict[str, Any]]:
    """Write in a child that kills itself before its n-th operation, for every n; what is there after each."""
    outcomes = []
    for count in itertools.count():
        path = root / str(count) / "a"
        path.parent.mkdir(parents=True)
        if replace:
            make_old(path)
        child = os.fork()
        if not child:
            report = os.open(root / "operation", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
            with watched(killing(count, report)):
                write(path, replace=replace)
            os._exit(0)
        _, status = os.waitpid(child, 0)
        killed = os.WIFSIGNALED(status)
        state = {OLD_KEY: "old", NEW_KEY: "new", "null": "nothing"}
        at_once = state.get(key(content(path)), "broken")
        visible = [name for name in names(path.parent) if not name.startswith(".")]
        recover(path)
        read = state.get(key(content(path)), "broken")
        write(path, replace=True)
        outcomes.append(
            {
                "operation": (root / "operation").read_text(),
                "status": "killed" if killed else os.waitstatus_to_exitcode(status),
                "at once": at_once,
                "visible": visible,
                "read": read,
                "next": state.get(key(content(path)), "broken"),
                "left": names(path.parent),
            }
        )
        shutil.rmtree(root / str(count))
        if not killed:
            return outcomes
    raise AssertionError("unreachable")


def killing(count: int, report: int) -> Callable[[str, Path], None]:
    left = iter(range(count))

    def before(name: str, _: Path) -> None:
        if next(left, None) is None:
            os.write(report, name.encode())
            os.kill(os.getpid(), signal.SIGKILL)

    return before


def key(files: dict[str, bytes] | None) -> str:
    return json.dumps(files and {name: data.decode() for name, data in sorted(files.items())})


OLD_KEY, NEW_KEY = key(OLD), key(NEW)


@linux
@pytest.mark.parametrize("replace", [False, True])
def test_a_kill_at_any_operation_leaves_the_old_or_the_new_state(tmp_path: Path, replace: bool) -> None:
    # In a process of its own: this one has threads, which do not survive a fork.
    program = f"import json, sys; from pathlib import Path; sys.path.insert(0, {str(Path(__file__).parent)!r}); "
    program += f"import test_storage as t; print(json.dumps(t.kill_everywhere(Path({str(tmp_path)!r}), {replace})))"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    *killed, finished = json.loads(done.stdout)
    assert finished["status"] == 0
    assert finished["at once"] == "new"
    assert {outcome["status"] for outcome in killed} == {"killed"}
    assert len(killed) > (20 if replace else 12)
    assert {outcome["operation"] for outcome in killed} >= {"fsync", "rename", "open", "mkdir"}
    before = "old" if replace else "nothing"
    for outcome in killed:
        assert outcome["read"] in (before, "new"), outcome
        assert outcome["at once"] in (outcome["read"], "nothing"), outcome
        assert outcome["visible"] in ([], ["a"]), outcome
        assert outcome["next"] == "new", outcome
        assert outcome["left"] == ["a"], outcome
    reads = [outcome["read"] for outcome in killed]
    assert reads == sorted(reads, key=["nothing", "old", "new"].index), "once new, it stays new"
    if replace:
        # The one moment that `recover` is for: between the two renames.
        assert [outcome["operation"] for outcome in killed if outcome["at once"] == "nothing"] == ["rename"]


def test_recover_leaves_everything_else_alone(tmp_path: Path) -> None:
    path = tmp_path / "a"
    recover(path)
    assert names(tmp_path) == []
    make_old(path)
    make_old(tmp_path / ".a.partial-00000000")
    recover(path)
    assert names(tmp_path) == [".a.partial-00000000", "a"]
    # Killed after the second rename: the new one counts.
    path.rename(tmp_path / ".a.previous")
    path.mkdir()
    fill(path, NEW)
    recover(path)
    assert content(path) == NEW
    write(path, OLD, replace=True)
    assert content(path) == OLD
    assert names(tmp_path) == ["a"]


def test_a_writer_that_may_not_replace_puts_the_old_folder_back(tmp_path: Path) -> None:
    make_old(tmp_path / ".a.previous")
    with pytest.raises(UsageError, match="already exists"):
        write(tmp_path / "a")
    assert content(tmp_path / "a") == OLD
    assert names(tmp_path) == ["a"]


def test_a_reader_does_not_disturb_a_replacement_that_goes_on(tmp_path: Path) -> None:
    make_old(tmp_path / ".a.previous")
    with locked(tmp_path / "a"), pytest.raises(LockedError, match=f"locked by PID {os.getpid()}"):
        recover(tmp_path / "a")
    assert names(tmp_path) == [".a.previous"]


# --- faults of the disk


@linux
@pytest.mark.parametrize("replace", [False, True])
@pytest.mark.parametrize(
    ("number", "expected", "message"),
    [
        (errno.ENOSPC, NoRoomError, "the disk is full: more than the "),
        (errno.EDQUOT, NoRoomError, "this user's quota of the disk is used up: more than the "),
        (errno.EFBIG, NoRoomError, "a file is larger than its file system allows: more than the "),
        (errno.EROFS, UsageError, "cannot be written"),
        (errno.EACCES, UsageError, "choose another output"),
        (errno.EIO, EdgetuneError, "check the disk"),
    ],
)
def test_a_fault_at_any_operation_leaves_the_old_or_the_new_state(
    tmp_path: Path, number: int, expected: type[EdgetuneError], message: str, replace: bool
) -> None:
    for count in itertools.count():
        path = tmp_path / str(count) / "a"
        path.parent.mkdir()
        if replace:
            make_old(path)
        failed: list[str] = []
        error = None
        with watched(failing(count, number, failed)):
            try:
                write(path, replace=replace)
            except EdgetuneError as caught:
                error = caught
        if not failed:
            assert count > (12 if replace else 10)
            return
        if error is None:  # without its PID the lock holds all the same
            assert (failed, number) == (["open .a.lock"], errno.EACCES)
            assert content(path) == NEW
        else:
            assert type(error) is expected, (failed, error)
            assert message in str(error)
            assert str(path) in str(error)
        recover(path)
        assert content(path) in (OLD if replace else None, NEW)
        write(path, replace=True)
        assert names(path.parent) == ["a"]


def failing(count: int, number: int, failed: list[str]) -> Callable[[str, Path], None]:
    left = iter(range(count))

    def before(name: str, place: Path) -> None:
        if failed or name not in ("open", "mkdir", "rename", "fsync") or (name == "mkdir" and place.exists()):
            return
        if next(left, None) is None:
            failed.append(f"{name} {place.name}")
            raise OSError(number, os.strerror(number), None if name == "fsync" else str(place))

    return before


def test_a_full_disk_is_told_in_bytes(tmp_path: Path) -> None:
    def run() -> None:
        with atomic_folder(tmp_path / "new" / "a") as folder:
            fill(folder, {"x": b"x" * 12_345})
            raise OSError(errno.ENOSPC, "No space left on device")

    with pytest.raises(NoRoomError, match=r"more than the 12,345 bytes that were written .* [\d,]+ are free"):
        run()


def test_what_needs_more_room_than_there_is_is_refused_at_once(tmp_path: Path) -> None:
    free = shutil.disk_usage(tmp_path).free
    needed = 2 * free
    with (
        pytest.raises(NoRoomError, match=rf"a: the disk is full: {needed:,} bytes are needed, [\d,]+ are free now"),
        atomic_folder(tmp_path / "new" / "a", needed=needed),
    ):
        raise AssertionError("not reached")
    assert names(tmp_path) == []


@pytest.mark.parametrize(
    "error",
    [
        EdgetuneError("Olive's pass failed:\nOSError: [Errno 28] No space left on device"),
        RuntimeError("onnxruntime_pybind_lora.cc:151 Failed to write :400640 bytes to x"),
    ],
)
def test_a_full_disk_is_told_in_bytes_whoever_found_it(tmp_path: Path, error: Exception) -> None:
    def run() -> None:
        with atomic_folder(tmp_path / "a") as folder:
            fill(folder, {"x": b"x" * 12_345})
            raise error

    with pytest.raises(NoRoomError, match="more than the 12,345 bytes that were written are needed") as caught:
        run()
    assert str(caught.value).startswith(str(error))
    assert names(tmp_path) == []


def test_a_full_disk_elsewhere_is_named(tmp_path: Path) -> None:
    other = tmp_path / "other" / "scratch"

    def run() -> None:
        with atomic_folder(tmp_path / "outputs" / "a"):
            raise OSError(errno.ENOSPC, "No space left on device", str(other))

    with pytest.raises(NoRoomError, match=f"^{other}: the disk is full"):
        run()


def test_a_file_that_is_written_again_keeps_its_room(tmp_path: Path) -> None:
    path = tmp_path / "x"
    write_file(path, b"y" * 100_000)
    place = path.stat().st_ino
    write_file(path, b"short")
    assert path.read_bytes() == b"short"
    assert path.stat().st_ino == place


def test_a_full_disk_is_told_where_not_even_the_parent_can_be_made(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def mkdir(path: Path, *_: object, **__: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device", str(path))

    monkeypatch.setattr(Path, "mkdir", mkdir)
    with pytest.raises(NoRoomError, match="the disk is full"):
        write(tmp_path / "new" / "deeper" / "a")


def test_errors_about_other_files_stay_what_they_are(tmp_path: Path) -> None:
    def run() -> None:
        with atomic_folder(tmp_path / "a"):
            raise PermissionError(errno.EACCES, "Permission denied", str(tmp_path / "secret.safetensors"))

    with pytest.raises(PermissionError, match=r"secret\.safetensors"):
        run()


@pytest.mark.parametrize(
    ("output", "reason"),
    [("file/a", "File exists"), ("file/a/b", "Not a directory"), ("x" * 250, "name too long"), ("x" * 300, "too long")],
)
def test_an_output_that_cannot_be(tmp_path: Path, output: str, reason: str) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UsageError, match=f"cannot be written .*{reason}"):
        write(tmp_path / output)
    assert names(tmp_path) == ["file"]


@linux
@pytest.mark.parametrize("output", ["/proc/a", "/proc/a/b"])
def test_an_output_where_no_folder_can_be_made(output: str) -> None:
    with pytest.raises(UsageError, match=rf"^{output}: cannot be written \(No such file .*choose another output"):
        write(Path(output))


def test_a_file_that_is_missing_in_what_is_built_is_no_matter_of_the_output(tmp_path: Path) -> None:
    def run() -> None:
        with atomic_folder(tmp_path / "a") as folder:
            (folder / "graph.onnx").read_bytes()

    with pytest.raises(FileNotFoundError, match=r"graph\.onnx"):
        run()


def test_a_circle_of_links_is_refused(tmp_path: Path) -> None:
    (tmp_path / "a").symlink_to(tmp_path / "b")
    (tmp_path / "b").symlink_to(tmp_path / "a")
    with pytest.raises(UsageError, match="cannot be written"):
        write(tmp_path / "a" / "x")


# --- locks

HOLD = """
import sys
from pathlib import Path
from edgetune.formats.storage import locked
with locked(Path(sys.argv[1])):
    print("held", flush=True)
    input()
"""


@contextmanager
def holder(path: Path) -> Iterator[subprocess.Popen[str]]:
    with subprocess.Popen(
        [sys.executable, "-c", HOLD, str(path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "held\n"
        try:
            yield process
        finally:
            process.kill()


def test_the_loser_names_the_pid_of_the_holder(tmp_path: Path) -> None:
    path = tmp_path / "a"
    with holder(path) as process:
        make_old(tmp_path / ".a.partial-of-the-holder")
        with pytest.raises(LockedError, match=f"a: locked by PID {process.pid}; wait for it or end it"):
            write(path)
        assert names(tmp_path) == [".a.lock", ".a.partial-of-the-holder"]
        process.kill()
        process.wait()
        assert names(tmp_path) == [".a.lock", ".a.partial-of-the-holder"]
        write(path)  # the lock of a killed process is free
        assert names(tmp_path) == ["a"]


def test_a_lock_without_a_readable_pid_holds(tmp_path: Path) -> None:
    with holder(tmp_path / "a"):
        (tmp_path / ".a.lock").write_text("")
        with pytest.raises(LockedError, match="locked by PID unknown"):
            write(tmp_path / "a")
    assert exit_code_of(LockedError) == 7


def test_a_lock_that_is_released_right_now_is_still_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def too_late(path: Path, **_: str) -> str:
        raise FileNotFoundError(errno.ENOENT, "gone", str(path))

    with holder(tmp_path / "a"):
        monkeypatch.setattr(Path, "read_text", too_late)
        with pytest.raises(LockedError, match="locked by PID unknown"):
            write(tmp_path / "a")


def test_a_lock_that_takes_no_pid_holds(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(path: Path, *_: object, **__: object) -> None:
        raise PermissionError(errno.EACCES, "locked, as Windows has it", str(path))

    with monkeypatch.context() as patch:
        for name in ("read_text", "write_text", "unlink"):
            patch.setattr(Path, name, refuse)
        with locked(tmp_path / "a"), pytest.raises(LockedError, match="PID unknown"):
            write(tmp_path / "a")
        write(tmp_path / "a")
    assert content(tmp_path / "a") == NEW


def test_a_link_and_its_target_have_one_lock(tmp_path: Path) -> None:
    make_old(tmp_path / "real" / "v1")
    (tmp_path / "current").symlink_to(tmp_path / "real" / "v1")
    with holder(tmp_path / "current"), pytest.raises(LockedError):
        write(tmp_path / "real" / "v1", replace=True)


@pytest.mark.parametrize("replace", [False, True])
def test_of_many_writers_at_once_one_wins(tmp_path: Path, replace: bool) -> None:
    for number in range(10):
        race = Race(tmp_path / str(number) / "a", replace)
        threads = [threading.Thread(target=race.run, args=(number,)) for number in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert race.most_at_once == 1
        assert len(race.won) + len(race.lost) == 8
        assert len(race.won) == 1 or (replace and race.won)
        assert content(race.path) == {"who": str(race.won[-1]).encode()}
        assert all(isinstance(error, LockedError | UsageError) for error in race.lost)
        assert names(race.path.parent) == ["a"]


class Race:
    def __init__(self, path: Path, replace: bool) -> None:
        self.path, self.replace = path, replace
        self.start = threading.Barrier(8)
        self.inside = self.most_at_once = 0
        self.won: list[int] = []
        self.lost: list[EdgetuneError] = []

    def run(self, number: int) -> None:
        self.start.wait()
        try:
            with atomic_folder(self.path, replace=self.replace) as folder:
                self.inside += 1
                self.most_at_once = max(self.most_at_once, self.inside)
                fill(folder, {"who": str(number).encode()})
                self.won.append(number)
                self.inside -= 1
        except EdgetuneError as error:
            self.lost.append(error)


# --- bytes


@pytest.mark.parametrize("size", [0, 1, storage.CHUNK - 1, storage.CHUNK, storage.CHUNK + 1])
def test_hashes_are_those_of_sha256sum(tmp_path: Path, size: int) -> None:
    write_file(tmp_path / "x", os.urandom(size))
    expected = subprocess.run(["sha256sum", tmp_path / "x"], capture_output=True, text=True, check=True).stdout
    assert sha256_of(tmp_path / "x") == expected.split()[0]


def test_a_sparse_file_over_2_gib_is_hashed_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    size = (1 << 31) + 1
    with (tmp_path / "x").open("wb") as file:
        file.truncate(size)
    read = 0

    class Counting:
        def update(self, piece: bytes) -> None:
            nonlocal read
            read += len(piece)

        def hexdigest(self) -> str:
            return ""

    monkeypatch.setattr(storage.hashlib, "sha256", Counting)
    sha256_of(tmp_path / "x")
    assert read == size


def test_a_folder_that_cannot_be_removed_does_not_stop_the_next_writer(tmp_path: Path) -> None:
    stale = tmp_path / ".a.partial-0123abcd" / "locked"
    make_old(stale)
    stale.chmod(0o500)
    try:
        write(tmp_path / "a")
        assert content(tmp_path / "a") == NEW
    finally:
        with suppress(FileNotFoundError):  # root removes it
            stale.chmod(0o700)


# --- a single file


def _write(path: Path, data: bytes) -> None:
    with atomic_file(path, replace=True) as file:
        file.write(data)


def test_a_file_appears_whole_or_not_at_all(tmp_path: Path) -> None:
    path = tmp_path / "new" / "rows.jsonl"
    for is_there in (False, True):
        before = b"first" if is_there else None
        with pytest.raises(ValueError, match="half"), atomic_file(path, replace=True) as file:
            file.write(b"half of it")
            raise ValueError("half")
        assert (path.read_bytes() if path.exists() else None) == before
        with atomic_file(path, replace=True) as file:
            file.write(b"first")
            assert (path.read_bytes() if path.exists() else None) == before
            with pytest.raises(LockedError, match="locked by PID"), atomic_file(path, replace=True):
                pytest.fail("two wrote it at once")
        assert path.read_bytes() == b"first"
        assert names(path.parent) == ["rows.jsonl"]


def test_what_a_killed_writer_of_a_file_left_goes_away_with_the_next(tmp_path: Path) -> None:
    (tmp_path / ".rows.partial-0123abcd").write_bytes(b"half")
    (tmp_path / ".other.partial-0123abcd").write_bytes(b"another's")
    with atomic_file(tmp_path / "rows") as file:
        file.write(b"all")
    assert names(tmp_path) == [".other.partial-0123abcd", "rows"]


def test_a_file_that_cannot_be_written_is_told_with_its_path(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"")
    for path, reason in (
        (tmp_path / "file" / "rows", "cannot be written"),
        (tmp_path, "is a folder; give the path of the file to write"),
        (tmp_path / "file", "already exists; choose another output or add --force"),
    ):
        with pytest.raises(UsageError, match=reason), atomic_file(path):
            pytest.fail("it was begun")
    if Path("/dev/full").exists():
        with pytest.raises(NoRoomError), atomic_file(tmp_path / "rows"):
            raise OSError(errno.ENOSPC, "No space left on device")
        assert names(tmp_path) == ["file"]


def test_a_file_is_wholly_there_or_as_before(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "page.html"
    _write(path, b"old")
    for broken in ("fsync", "replace"):

        def fail(*_: object) -> None:
            raise OSError(errno.ENOSPC, "No space left on device", str(path))

        with monkeypatch.context() as patched:
            patched.setattr(os, broken, fail)
            with pytest.raises(NoRoomError):
                _write(path, b"new" * 1000)
        assert (names(tmp_path), path.read_bytes()) == (["page.html"], b"old")
    (tmp_path / ".page.html.partial-of-a-killed-process").touch()
    _write(path, b"new")
    assert (names(tmp_path), path.read_bytes()) == (["page.html"], b"new")
    with locked(path), pytest.raises(LockedError):
        _write(path, b"newer")
    assert (names(tmp_path), path.read_bytes()) == (["page.html"], b"new")


def test_a_file_of_no_unicode_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="not valid Unicode"):
        _write(tmp_path / "half\udcff", b"new")
    assert names(tmp_path) == []
