"""The isolated environment with ONNX Runtime Training, made on first use.

`onnxruntime` and `onnxruntime-training-cpu` install the same import package and cannot share an environment. What
differentiates graphs, and the `ort-training` runtime, therefore run as scripts ("workers") in an environment of their
own and are talked to through files and pipes. `requirements.txt` beside this file pins it, with hashes.
"""

from __future__ import annotations

import hashlib
import platform
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path

from edgetune.errors import EdgetuneError, LockedError, MissingDependencyError, ResourceError, UsageError
from edgetune.formats.storage import atomic_folder, locked, write_file
from edgetune.machine.cache_folder import CHOSEN, cache_folder
from edgetune.machine.exhaustion import ADVICE, lack_behind, lack_of_process

REQUIREMENTS = Path(__file__).with_name("requirements.txt")
_LAUNCHER = Path(__file__).with_name("launcher.py")
_PROBE = Path(__file__).with_name("probe.py")
_MARKER = "verified"
"""Written last, with what the probe printed."""
_PYTHON = "3.11"
"""The newest CPython that ONNX Runtime Training has wheels for, and the oldest that the pinned numpy has."""
_PLATFORMS = {("Linux", "x86_64"), ("Darwin", "arm64"), ("Darwin", "x86_64"), ("Windows", "AMD64")}
_WAIT_SECONDS = 0.5


def find_side_environment() -> Path | None:
    """The side environment's python, or None when it has not been made yet. Creates nothing."""
    folder = _folder()
    python = _python_of(folder)
    return python if (folder / _MARKER).is_file() and python.exists() else None


def side_environment_version() -> str | None:
    """What the side environment holds, such as `onnxruntime-training-cpu 1.19.2`, or None when it is not there."""
    return (_folder() / _MARKER).read_text().strip() if find_side_environment() else None


def ensure_side_environment(say: Callable[[str], None]) -> Path:
    """Make the side environment unless it is there; a second process waits for the first.

    Args:
        say: Takes a line for the person: that this happens, and where.

    Returns:
        Its python.

    Raises:
        MissingDependencyError: No wheel for this platform, no CPython 3.11, or pip could not install.
        UsageError: The cache folder cannot be written.
        ResourceError: The disk is full.
    """
    if python := find_side_environment():
        return python
    base = base_interpreter()
    folder = _folder()
    with _turn(folder.parent, say):
        if python := find_side_environment():
            return python
        say(f"Creating the side environment with ONNX Runtime Training in {folder} (once, about 45 MB to download) …")
        with atomic_folder(folder, replace=True) as partial:
            _build(partial, base)
    return _python_of(folder)


def base_interpreter() -> Path:
    """The CPython 3.11 that the side environment is made with: the running one, otherwise `python3.11` on the PATH.

    Raises:
        MissingDependencyError: There is none, or ONNX Runtime Training has no wheel for this platform.
    """
    system, machine = platform.system(), platform.machine()
    if (system, machine) not in _PLATFORMS:
        raise MissingDependencyError(
            f"ONNX Runtime Training has no wheel for {system} {machine}, only for Linux x86_64, macOS and Windows "
            "AMD64; train with --runtime onnxruntime, and prepare bundles on such a host"
        )
    # In a virtual environment sys.executable would lead back into it; this is the interpreter beneath.
    for candidate in (getattr(sys, "_base_executable", None), shutil.which(f"python{_PYTHON}")):
        if candidate and _fits(candidate):
            return Path(candidate)
    raise MissingDependencyError(
        f"ONNX Runtime Training needs CPython {_PYTHON} with venv and pip, and this is {platform.python_version()}: "
        f"install it so that `python{_PYTHON}` is on the PATH (Debian: apt install python{_PYTHON}-venv), or train "
        "with --runtime onnxruntime"
    )


def worker_command(script: Path, arguments: Sequence[str]) -> list[str]:
    """The command line that runs a worker, for callers that talk to it through pipes.

    The worker sees neither the user's PYTHON… variables nor packages, nor the files beside it as modules.

    Raises:
        MissingDependencyError: The side environment is not there.
    """
    python = find_side_environment()
    if python is None:
        raise MissingDependencyError(
            "the side environment with ONNX Runtime Training is not there; `edgetune prepare` creates it on first use"
        )
    return _isolated(python, str(_LAUNCHER), str(script), *arguments)


def run_worker(script: Path, arguments: Sequence[str]) -> str:
    """Run a worker to its end.

    Args:
        script: A Python file that imports nothing of edgetune.
        arguments: Its command line.

    Returns:
        What it printed.

    Raises:
        MissingDependencyError: The side environment is not there.
        ResourceError: It ran out of memory or of room on a disk, or the system ended it, as happens then.
        EdgetuneError: It failed; the message has its last line on stderr, the exception's notes have the rest.
    """
    return _run(worker_command(script, arguments), script.name)


def _folder() -> Path:
    digest = hashlib.sha256(REQUIREMENTS.read_bytes()).hexdigest()[:16]
    return cache_folder() / "side-environment" / f"cpython{_PYTHON}-{digest}"


def _python_of(folder: Path) -> Path:
    return folder / "Scripts" / "python.exe" if sys.platform == "win32" else folder / "bin" / "python"


def _isolated(python: str | Path, *arguments: str) -> list[str]:
    return [str(python), "-I", "-X", "utf8", *arguments]


def _fits(python: str) -> bool:
    """Whether `python` runs (a pyenv shim may not), is CPython of the right version, and can make environments."""
    question = "import ensurepip, sys, venv; print(sys.implementation.name, *sys.version_info[:2], sep='.')"
    try:
        answer = subprocess.run(_isolated(python, "-c", question), capture_output=True, text=True, check=False)
    except OSError as error:
        if lack_behind(error):
            raise
        return False
    return answer.stdout.strip() == f"cpython.{_PYTHON}"


@contextmanager
def _turn(folder: Path, say: Callable[[str], None]) -> Iterator[None]:
    """Wait until no other process makes an environment in `folder`."""
    with ExitStack() as stack:
        waiting = False
        while True:
            try:
                folder.mkdir(parents=True, exist_ok=True)
                stack.enter_context(locked(folder))
                break
            except OSError as error:
                if lack_behind(error):
                    raise
                fix = f"name a folder of yours in {CHOSEN}"
                raise UsageError(f"{folder}: cannot be written ({error.strerror}); {fix}") from error
            except LockedError as error:
                if not waiting:
                    say(f"Waiting for another process: {error}")
                waiting = True
                time.sleep(_WAIT_SECONDS)
        yield


def _build(folder: Path, base: Path) -> None:
    _run(_isolated(base, "-m", "venv", str(folder)), "making the side environment")
    python = _python_of(folder)
    install = ["install", "--require-hashes", "--no-deps", "--only-binary", ":all:", "--no-input"]
    install += ["--quiet", "--disable-pip-version-check"]
    try:
        _run(_isolated(python, "-m", "pip", *install, "--requirement", str(REQUIREMENTS)), "pip")
    except ResourceError:
        raise
    except EdgetuneError as error:
        raise MissingDependencyError(
            f"the side environment with ONNX Runtime Training could not be installed: {error}; check the network and "
            "`pip config list`, then run the same command again"
        ) from error
    version = _run(_isolated(python, str(_LAUNCHER), str(_PROBE)), "the side environment's import check")
    write_file(folder / _MARKER, version.encode())


def _run(command: list[str], name: str) -> str:
    done = subprocess.run(command, capture_output=True, text=True, encoding="utf-8", errors="replace", check=False)
    if done.returncode == 0:
        return done.stdout
    lines = [line for line in (done.stderr or done.stdout).splitlines() if line.strip()]
    reason = lines[-1].strip() if lines else "it said nothing"
    failed = f"{name} failed (exit {done.returncode}): {reason}"
    if lack := lack_of_process(done.returncode, "\n".join(lines)):
        raise ResourceError(f"{failed}\n{ADVICE[lack]}")
    error = EdgetuneError(failed)
    error.add_note("\n".join(lines[-40:]))
    raise error
