"""`prepare` and `export`, for real, ended at many moments: nothing looks finished, and the next run works."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest

from edgetune.formats.adapter import write_adapter
from edgetune.formats.bundle import load_bundle
from edgetune.formats.genai import open_model
from edgetune.model.lora import initial_parameters
from support.golden import BUNDLE
from support.repository import ROOT
from support.small_checkpoint import plant_code, write_checkpoint

FOREIGN = {"torchinductor_root"}
"""What torch leaves among the temporary files when it is imported."""


@pytest.fixture
def scratch(tmp_path: Path) -> Path:
    """Where the commands keep temporary files."""
    folder = tmp_path / "scratch"
    folder.mkdir()
    return folder


@contextmanager
def command(scratch: Path, *arguments: str | Path) -> Iterator[subprocess.Popen[str]]:
    """A running `edgetune`, in a process group of its own, which ends with the block."""
    with subprocess.Popen(
        [sys.executable, "-m", "edgetune", *map(str, arguments)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": str(ROOT), "TMPDIR": str(scratch)},
        start_new_session=True,
    ) as process:
        try:
            yield process
        finally:
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)


def reach(process: subprocess.Popen[str], line: str, seconds: float) -> None:
    """Wait until the command says `line`, and then `seconds` more."""
    assert process.stderr is not None
    said = []
    while not (said and said[-1].startswith(line)):
        said.append(process.stderr.readline())
        assert said[-1], f"ended without saying {line!r}: {said}"
    time.sleep(seconds)


def finish(scratch: Path, *arguments: str | Path) -> None:
    with command(scratch, *arguments) as process:
        _, stderr = process.communicate()
    assert process.returncode == 0, stderr


def living(group: int) -> list[str]:
    """Command lines of the processes in a group."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        with suppress(FileNotFoundError, ProcessLookupError):
            state, _, member_of = (folder / "stat").read_text().rpartition(")")[2].split()[:3]
            if int(member_of) == group and state != "Z":
                found.append((folder / "cmdline").read_text())
    return found


def wait_until(happened: Callable[[], bool], seconds: float = 30.0) -> None:
    deadline = time.monotonic() + seconds
    while not happened():
        assert time.monotonic() < deadline, "did not happen"
        time.sleep(0.05)


def visible(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir() if not path.name.startswith("."))


def partial(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir() if ".partial-" in path.name}


SMALL = ["--rank", "2", "--max-length", "64"]
PREPARE_MOMENTS = [
    ("Building the fp32 GenAI model", 1.0),  # Olive works in a child
    ("Exporting the forward graph", 0.5),
    ("Differentiating", 0.1),
    ("Lowering", 0.0),
    ("Hashing", 0.0),
]


def test_a_killed_prepare_leaves_nothing_that_looks_finished(tmp_path: Path, scratch: Path) -> None:
    source = write_checkpoint(tmp_path / "source" / "tiny")
    marker = tmp_path / "ran"
    plant_code(source, marker)
    folder = tmp_path / "work"
    folder.mkdir()
    arguments = [
        "prepare",
        source,
        "--output",
        folder / "bundle",
        "--base",
        "fp32",
        "--rank",
        "2",
        "--max-length",
        "64",
    ]
    stale: set[str] = set()
    for number, (line, seconds) in enumerate(PREPARE_MOMENTS):
        with command(scratch, *arguments, "--force") as process:
            reach(process, line, seconds)
            left = partial(folder)
            if number == 0:
                process.kill()  # the system kills this one for its memory; Olive's child has to notice
                process.wait()
            else:
                os.killpg(process.pid, signal.SIGKILL)  # the power is cut
            process.wait()
        assert process.returncode == -signal.SIGKILL
        if line == "Hashing" and visible(folder):  # too late: it was done
            load_bundle(folder / "bundle")
            continue
        assert visible(folder) == [], line
        assert len(left) == 1, line
        assert not left & stale, "the partial folder of the run before is gone"
        stale = partial(folder)
    # What a user sees after a kill; the checkpoint's own code has never run.
    finish(scratch, *arguments, *(["--force"] if visible(folder) else []))
    assert sorted(path.name for path in folder.iterdir()) == ["bundle"]
    assert load_bundle(folder / "bundle").manifest.base.name == "tiny"
    assert not marker.exists()
    assert not [path for path in (folder / "bundle").rglob("*") if path.suffix == ".py"]
    assert b"auto_map" not in (folder / "bundle" / "config.json").read_bytes()
    assert b"auto_map" not in (folder / "bundle" / "tokenizer_config.json").read_bytes()


def test_olive_ends_with_the_process_that_started_it(tmp_path: Path) -> None:
    (tmp_path / "olive").mkdir()
    (tmp_path / "olive" / "__init__.py").write_text("import time\ntime.sleep(600)\n")
    run = "from edgetune.host.olive_pass import *; run_olive_pass('ModelBuilder', {}, Path('source'), Path('out'))"
    with subprocess.Popen(
        [sys.executable, "-c", run],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": os.pathsep.join([str(tmp_path), str(ROOT)])},
        start_new_session=True,
    ) as process:
        try:
            wait_until(lambda: len(living(process.pid)) == 2)
            process.kill()
            process.wait()
            wait_until(lambda: not living(process.pid))
        finally:
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)


EXPORT_MOMENTS = [
    *(("fp32", seconds) for seconds in (0.0, 0.01, 0.02, 0.03, 0.05)),
    ("int4", 0.01),
    ("int4", 0.03),
]


@pytest.fixture
def adapter(tmp_path: Path) -> Path:
    manifest = load_bundle(BUNDLE).manifest
    folder = tmp_path / "adapter"
    folder.mkdir()
    write_adapter(
        folder,
        base=manifest.base,
        tokenizer=manifest.tokenizer,
        lora=manifest.lora,
        parameters=initial_parameters(manifest.lora, 0),
        provenance={},
    )
    return folder


def test_a_killed_export_leaves_nothing_that_looks_finished(tmp_path: Path, scratch: Path, adapter: Path) -> None:
    folder = tmp_path / "work"
    folder.mkdir()
    arguments = ["export", BUNDLE, "--adapter", adapter, "--output", folder / "model"]
    killed_on_the_way = 0
    for precision, seconds in EXPORT_MOMENTS:
        with command(scratch, *arguments, "--precision", precision, "--unmeasured") as process:
            reach(process, f"merging the adapter into {precision} weights", seconds)
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
        if visible(folder):  # too late: it was done
            open_model(folder / "model")
            shutil.rmtree(folder / "model")
        else:
            killed_on_the_way += 1
            assert len(partial(folder)) <= 1
    assert killed_on_the_way >= 3
    for choice in ("--merge", "--keep-adapter"):
        finish(scratch, *arguments, choice, "--force")
        assert sorted(path.name for path in folder.iterdir()) == ["model"]
        open_model(folder / "model")


def test_a_killed_replacement_leaves_the_old_model(tmp_path: Path, scratch: Path, adapter: Path) -> None:
    folder = tmp_path / "work"
    folder.mkdir()
    arguments = ["export", BUNDLE, "--adapter", adapter, "--output", folder / "model"]
    finish(scratch, *arguments, "--keep-adapter")
    for seconds in (0.0, 0.02, 0.04):
        with command(scratch, *arguments, "--merge", "--force") as process:
            reach(process, "merging the adapter into", seconds)
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
        assert visible(folder) == ["model"]
        open_model(folder / "model")
    finish(scratch, *arguments, "--keep-adapter", "--force")
    assert open_model(folder / "model").adapters == [adapter.name]
    assert sorted(path.name for path in folder.iterdir()) == ["model"]


@pytest.mark.parametrize(
    ("number", "line", "seconds"),
    [(signal.SIGTERM, "Building", 1.0), (signal.SIGINT, "Building", 0.2), (signal.SIGINT, "Exporting", 0.5)],
)
def test_an_interrupted_prepare_cleans_up(
    tmp_path: Path, scratch: Path, number: signal.Signals, line: str, seconds: float
) -> None:
    source = write_checkpoint(tmp_path / "source" / "tiny")
    folder = tmp_path / "work"
    with command(scratch, "prepare", source, "--output", folder / "bundle", "--base", "fp32", *SMALL) as process:
        reach(process, line, seconds)
        process.send_signal(number)
        stdout, stderr = process.communicate(timeout=60)
        assert living(process.pid) == [], "Olive's process is ended as well"
    assert process.returncode == 130, stderr
    assert stderr.splitlines()[-1:] == ["error: interrupted"]
    assert len(stderr.splitlines()) <= 2  # at most a stage that began just then
    assert stdout == ""
    assert list(folder.iterdir()) == []
    assert {path.name for path in scratch.iterdir()} <= FOREIGN


def test_an_interrupted_export_cleans_up(tmp_path: Path, scratch: Path, adapter: Path) -> None:
    folder = tmp_path / "work"
    arguments = ["export", BUNDLE, "--adapter", adapter, "--output", folder / "model"]
    with command(scratch, *arguments, "--precision", "int4", "--unmeasured") as process:
        reach(process, "merging", 0.0)
        process.terminate()
        _, stderr = process.communicate(timeout=60)
        assert living(process.pid) == []
    assert process.returncode == 130, stderr
    assert stderr == "error: interrupted\n"
    assert list(folder.iterdir()) == []
    assert {path.name for path in scratch.iterdir()} <= FOREIGN


SWALLOWED = """
import contextlib
with contextlib.suppress(KeyboardInterrupt):  # as a library might
    signal.raise_signal(signal.SIGINT)
print("went on")
"""
DELETED = """
class Deleted:
    def __del__(self):
        signal.raise_signal(signal.SIGINT)
Deleted()
print("went on")
"""
FROM_A_STRING = """
exec("signal.raise_signal(signal.SIGINT)")
"""


@pytest.mark.parametrize(
    ("code", "said"), [(SWALLOWED, "went on\n"), (DELETED, "went on\n"), (FROM_A_STRING, "")], ids=lambda value: ""
)
def test_an_interruption_ends_a_command_wherever_it_is_raised(tmp_path: Path, code: str, said: str) -> None:
    """At the next stage where it was lost; CPython would end by the signal where it leaves code from a string."""
    body = "".join(f"        {line}\n" for line in code.strip().splitlines())
    (tmp_path / "interrupted.py").write_text(
        "import signal, sys\n"
        "from edgetune.cli.interruption import termination_interrupts\n"
        "from edgetune.cli.output import notices\n"
        "try:\n"
        "    with termination_interrupts():\n"
        f"{body}"
        "        notices(quiet=True)('the next stage')\n"
        "        print('and on')\n"
        "except KeyboardInterrupt:\n"
        "    sys.exit(130)\n"
    )
    path = os.pathsep.join([str(tmp_path), str(ROOT)])
    done = subprocess.run(
        [sys.executable, "-m", "interrupted"], env={**os.environ, "PYTHONPATH": path}, capture_output=True, text=True
    )
    assert (done.returncode, done.stdout, done.stderr) == (130, said, "")
