"""Too little memory, or too few threads, is exit code 6, whoever notices it and however it says so."""

from __future__ import annotations

import errno
import os
import signal
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

from edgetune.cli.failures import exit_code_of, failure_of
from edgetune.data.rows import Message
from edgetune.data.template import ChatTemplate
from edgetune.errors import DataError, EdgetuneError, IncompatibleError, ResourceError, UsageError
from edgetune.machine.exhaustion import Lack, lack_behind, lack_of_process
from support.golden import GOLDEN
from support.other_user import AS_USER, needs_another_user
from support.repository import ROOT
from support.small_checkpoint import write_checkpoint

ENVIRONMENT = {**os.environ, "PYTHONPATH": str(ROOT)}
POSIX = "onnxruntime::PosixThread::PosixThread(const char*, int, const ThreadOptions&) pthread_create failed, "

MEMORY = [
    # Said by OpenVINO, ONNX Runtime, the dynamic linker and Python under `ulimit -v` or `ulimit -u`.
    "Exception from src/inference/src/dev/plugin.cpp:54: can't alloc",
    "Exception from src/inference/src/dev/plugin.cpp:54: Resource temporarily unavailable",
    "Exception from src/inference/src/dev/plugin.cpp:54: std::bad_alloc",
    f"{POSIX}error code: 12 error msg: Cannot allocate memory",
    f"{POSIX}error code: 11 error msg: Resource temporarily unavailable",
    "libopenvino.so.2640: failed to map segment from shared object",
    "can't start new thread",
    # As their sources have it.
    "Unable to allocate 3.00 GiB for an array with shape (805306368,) and data type float32",
    "[ONNXRuntimeError] : 6 : RUNTIME_EXCEPTION : Failed to allocate memory for requested buffer of size 4294967296",
    "c++: fatal error: Killed signal terminated program cc1plus",
]
OTHERS = ["", "Load model from x failed: Protobuf parsing failed.", "the graph has no node MatMul", "killed"]


@pytest.mark.parametrize("text", MEMORY)
def test_what_libraries_say_of_memory(text: str) -> None:
    assert lack_behind(RuntimeError(text)) == "memory"
    assert lack_of_process(1, f"Traceback\n{text}\n") == "memory"
    assert lack_of_process(0, text) is None


@pytest.mark.parametrize("text", OTHERS)
def test_other_words_say_nothing_of_it(text: str) -> None:
    assert lack_behind(RuntimeError(text)) is None
    assert lack_of_process(1, text) is None


@pytest.mark.parametrize(
    ("number", "lack"),
    [
        (errno.ENOMEM, "memory"),
        (errno.EAGAIN, "memory"),
        (errno.ENOSPC, "room"),
        (errno.EDQUOT, "room"),
        (errno.EFBIG, "room"),
        (errno.EIO, None),
        (errno.EROFS, None),
    ],
)
def test_numbers_of_the_system(number: int, lack: Lack | None) -> None:
    assert lack_behind(OSError(number, os.strerror(number))) == lack
    # As a process prints it last.
    assert lack_of_process(1, f"OSError: [Errno {number}] {os.strerror(number)}: '/x'") == lack


@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no such signals")
def test_signals_that_the_system_ends_a_process_with() -> None:
    assert lack_of_process(-signal.SIGKILL, "") == "memory"
    assert lack_of_process(-signal.SIGXFSZ, "") == "room"
    assert lack_of_process(-signal.SIGSEGV, "") is None
    assert lack_of_process(-signal.SIGABRT, "terminate called after throwing an instance of std::bad_alloc") == "memory"


def raised(outer: Exception, inner: BaseException, *, hidden: bool = False) -> Exception:
    try:
        try:
            raise inner
        except BaseException:
            if hidden:
                raise outer from None
            raise outer  # noqa: B904 - that is what is tested
    except Exception as error:
        return error


def test_what_led_to_an_error_tells_as_well() -> None:
    assert lack_behind(raised(IncompatibleError("cannot compile"), MemoryError())) == "memory"
    assert lack_behind(raised(IncompatibleError("cannot compile"), MemoryError(), hidden=True)) is None
    circle = ValueError("x")
    circle.__cause__ = circle
    assert lack_behind(circle) is None


def test_an_error_that_came_of_it_says_so_and_keeps_its_words() -> None:
    failure = failure_of(raised(IncompatibleError("OpenVINO's CPU cannot compile"), RuntimeError(MEMORY[0])))
    assert failure.code == exit_code_of(ResourceError)
    assert failure.message.splitlines() == [
        "error: OpenVINO's CPU cannot compile",
        "not enough memory; close other programs, or choose a smaller batch, length or model",
    ]
    failure = failure_of(EdgetuneError("pip failed: [Errno 28] No space left on device"))
    assert failure.code == exit_code_of(ResourceError)
    for error in (UsageError("--prompt 'out of memory'"), DataError(["a.jsonl:1: out of memory"])):
        assert failure_of(error).code == exit_code_of(type(error))


def test_a_library_says_last_why() -> None:
    failure = failure_of(RuntimeError("x" * 1000 + POSIX + "error code: 12 error msg: Cannot allocate memory"))
    assert failure.message.endswith("pthread_create failed, error code: 12 error msg: Cannot allocate memory)")
    assert len(failure.message) < 300


def limited(kilobytes: int, *arguments: str | Path) -> subprocess.CompletedProcess[str]:
    """Run a command with so much address space."""
    shell = ["bash", "-c", f'ulimit -v {kilobytes}; exec "$@"', "bash", sys.executable, "-m", "edgetune"]
    return subprocess.run(
        [*shell, *map(str, arguments)], env=ENVIRONMENT, capture_output=True, text=True, check=False, timeout=300
    )


ENDED_BY_LIBC = (127, -6)
"""Exit codes where the C or C++ library ends a process that finds no memory, in a thread of a library's: no program has
a say then. glibc's for thread-local data, and an abort."""
ENDED_IN_COMPILER = -11
"""OpenVINO's own compiler sometimes writes through an address that it was refused, inside `compile_model`."""


def ended_by_libc(done: subprocess.CompletedProcess[str]) -> bool:
    if done.returncode == ENDED_IN_COMPILER:
        return "on openvino" in done.stderr and "Traceback" not in done.stderr
    return done.returncode in ENDED_BY_LIBC and lack_of_process(done.returncode, done.stderr) == "memory"


def outcomes(done: list[subprocess.CompletedProcess[str]]) -> set[int]:
    """The exit codes, which are 0 or 6 wherever the program itself has a say."""
    for each in done:
        if ended_by_libc(each):
            continue
        assert each.returncode in (0, exit_code_of(ResourceError)), each.stderr
        assert "internal error" not in each.stderr
        assert "Traceback" not in each.stderr
        assert "not enough memory" in each.stderr or not each.returncode
    return {each.returncode for each in done} - {*ENDED_BY_LIBC, ENDED_IN_COMPILER}


SIZES = {
    "openvino": [400_000, 800_000, 1_000_000, 1_300_000, 1_500_000],
    "onnxruntime": [150_000, 180_000, 220_000, 270_000, 380_000],
    "ort-training": [180_000, 240_000, 300_000],
}


@pytest.mark.skipif(sys.platform != "linux", reason="other systems limit no address space")
@pytest.mark.parametrize("runtime", SIZES)
def test_training_in_too_little_memory(tmp_path: Path, runtime: str) -> None:
    if runtime == "openvino" and find_spec("openvino") is None:
        pytest.skip("openvino is not installed")
    arguments = ("train", GOLDEN / "bundle", "--data", GOLDEN / "train.jsonl", "--steps", "1", "--runtime", runtime)
    done = [limited(size, *arguments, "--output", tmp_path / str(size)) for size in SIZES[runtime]]
    assert exit_code_of(ResourceError) in outcomes(done)
    # Where even removing finds no memory, and after a kill, the next run takes the hidden folder away.
    for size in {path.name.split(".")[1] for path in tmp_path.iterdir() if path.name.startswith(".")}:
        assert limited(4_000_000, *arguments, "--output", tmp_path / size).returncode == 0
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith(".")] == []


@pytest.mark.skipif(sys.platform != "linux", reason="other systems limit no address space")
def test_preparing_in_too_little_memory(tmp_path: Path) -> None:
    source = write_checkpoint(tmp_path / "source" / "tiny")
    arguments = ("prepare", source, "--output", tmp_path / "bundle", "--base", "fp32", "--rank", "2")
    done = [limited(300_000, *arguments)]
    # That does not get as far as Olive's own process; one of these does, wherever its few libraries lie.
    for size in (1_400_000, 1_300_000, 1_500_000):
        done.append(limited(size, *arguments, "--force"))
        if "Olive's ModelBuilder failed" in done[-1].stderr:
            break
    assert exit_code_of(ResourceError) in outcomes(done)
    assert ["Olive's ModelBuilder failed" in each.stderr for each in (done[0], done[-1])] == [False, True]


@needs_another_user
@pytest.mark.parametrize("threads", [1, 2, 4, 5, 8])
def test_training_with_too_few_threads(threads: int) -> None:
    command = [*AS_USER, "bash", "-c", f'ulimit -u {threads}; exec "$@"', "bash", sys.executable, "-m", "edgetune"]
    arguments = ["eval", GOLDEN / "bundle", "--data", GOLDEN / "valid.jsonl"]
    done = subprocess.run(
        [*command, *map(str, arguments)], env=ENVIRONMENT, capture_output=True, text=True, check=False, timeout=300
    )
    found = outcomes([done])
    assert threads > 4 or found == {exit_code_of(ResourceError)}


@pytest.mark.skipif(sys.platform == "win32", reason="Windows ends no process so")
def test_a_chat_template_whose_process_the_system_ends() -> None:
    template = ChatTemplate("{{ messages[0].content }}", None, "</s>")
    assert template.render([Message("user", "a")], add_generation_prompt=False) == "a"
    assert template._process is not None
    template._process.kill()  # as the system does
    with pytest.raises(ResourceError, match="not enough memory"):
        template.render([Message("user", "a")], add_generation_prompt=False)
