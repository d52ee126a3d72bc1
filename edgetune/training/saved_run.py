"""The states of a run on disk: what a later process needs to go on as if there had been no interruption.

Beside an output `NAME`, in its parent, the folder `.NAME.run` holds the two newest states, each one file
`step-00000012.safetensors`: the session's tensors, the lines of the run record, and in the header what the run is
(`RunIdentity`), how far it came (`Progress`) and a SHA-256 of all that. A file is written under another name, flushed,
and renamed, so that it is wholly there or not there; the older one stands by where the newest cannot be read. What
enters the lowest trained layer lies there as well (`edgetune.runtimes.layered.cached_states`). Who writes or reads the
folder holds the lock of `NAME` (`storage.locked`).
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgetune.errors import VerificationError
from edgetune.formats.safetensors_file import NUMPY_TYPES, read_header, read_metadata, read_tensor, write_tensors
from edgetune.formats.storage import sync_folder
from edgetune.runtimes.contract import SessionState

_FORMAT = "edgetune-run-1"
_GENERATIONS = 2
_PARTIAL = ".partial"
_SESSION, _BEST, _RECORD = "session/", "best/", "record"
"""Names of tensors: of the session, of the parameters with the lowest validation loss, and the record's lines."""


@dataclass(frozen=True)
class RunIdentity:
    """What must be the same for a run to go on."""

    bundle: str
    """SHA-256 of its manifest."""
    rows: str
    """SHA-256 of the encoded training rows."""
    validation_rows: str
    """The same of those that are measured; empty without any."""
    options: dict[str, Any]
    """By their names in `TrainConfig`."""
    initial_adapter: str
    """SHA-256 of the parameters before the first step."""
    runtime: str
    runtime_version: str
    plan: str
    pass_rows: int | None
    threads: int
    free_memory_bytes: int | None
    """Memory that was free when the run was planned, by which a plan is chosen again."""


@dataclass(frozen=True)
class Progress:
    """How far a run came."""

    steps: int
    """Steps that were applied."""
    final_loss: float
    """Of the last step."""
    validation_losses: list[float]
    seconds: float
    """Wall time of the steps and validations."""
    stopped: str
    """Why the run ended by itself before its last step; empty where it did not."""
    best_step: int | None
    """With the lowest validation loss; none where nothing was measured after a step."""
    best_loss: float | None
    worse: int
    """Validations since then."""


@dataclass(frozen=True)
class SavedState:
    """One state."""

    identity: RunIdentity
    total_steps: int
    """Of the whole run."""
    progress: Progress
    session: SessionState
    record: bytes
    """Lines of the run record so far."""
    best: Mapping[str, NDArray[Any]]
    """Parameters after `Progress.best_step`; empty where they are not kept."""


class SavedRun:
    """The folder of a run's states.

    Args:
        output: What the run writes in the end.
    """

    def __init__(self, output: Path) -> None:
        real = Path(os.path.realpath(output))
        self.folder = real.parent / f".{real.name}.run"

    def steps(self) -> int | None:
        """Steps of the newest state, whether or not it can be read; none where there is none."""
        return max((_steps_of(path) for path in self._files()), default=None)

    def load(self, say: Callable[[str], None]) -> SavedState | None:
        """The newest state that can be read; none where there is none.

        Args:
            say: Hears why a newer one cannot be read.

        Raises:
            VerificationError: There are states, and every one of them is broken.
        """
        problems = []
        for path in sorted(self._files(), reverse=True):
            try:
                state = _read(path)
            except VerificationError as error:
                problems.append(str(error))
            else:
                for problem in problems:
                    say(f"{problem}; the run goes on from the state of step {state.progress.steps} instead")
                return state
        if problems:
            raise VerificationError("\n".join([*problems, "no state of the run can be read; start over with --force"]))
        return None

    def save(self, state: SavedState) -> int:
        """Write a state; older ones but the last go away once it is safe.

        Returns:
            Its bytes.

        Raises:
            OSError: It cannot be written; the states of before are still there.
        """
        self.folder.mkdir(exist_ok=True)
        path = self.folder / f"step-{state.progress.steps:08d}.safetensors"
        partial = path.with_name(path.name + _PARTIAL)
        tensors = _tensors(state)
        described = json.dumps(
            {
                "identity": asdict(state.identity),
                "total_steps": state.total_steps,
                "progress": asdict(state.progress),
            },
            sort_keys=True,
        )
        metadata = {"format": _FORMAT, "run": described, "sha256": _digest(described, tensors)}
        try:
            with partial.open("wb") as file:
                write_tensors(file, tensors, metadata)
                file.flush()
                os.fsync(file.fileno())
            os.replace(partial, path)
        finally:
            partial.unlink(missing_ok=True)
        sync_folder(self.folder)
        for older in sorted(self._files(), reverse=True)[_GENERATIONS:]:
            older.unlink(missing_ok=True)
        return path.stat().st_size

    def remove(self) -> None:
        """Throw all states away."""
        # The oldest first: what a process that dies in between leaves is the newest, which the run has passed.
        for path in sorted(self._files()):
            path.unlink(missing_ok=True)
        shutil.rmtree(self.folder, ignore_errors=True)

    def tidy(self) -> None:
        """Throw away what a run keeps beside its states, where there is none to go on from."""
        if self.steps() is None:
            self.remove()

    def _files(self) -> list[Path]:
        return list(self.folder.glob("step-*.safetensors")) if self.folder.is_dir() else []


def unfinished_in(folder: Path) -> dict[Path, int]:
    """Runs whose output was to lie in a folder and is not there: the newest step that each has a state of."""
    names = (path.name for path in folder.glob(".*.run"))
    outputs = (folder / name.removeprefix(".").removesuffix(".run") for name in names)
    steps = {output: SavedRun(output).steps() for output in outputs if not output.exists()}
    return {output: step for output, step in sorted(steps.items()) if step is not None}


def digest_of(arrays: Iterable[tuple[str, NDArray[Any]]]) -> str:
    """SHA-256 of named arrays: names, types, shapes and bytes."""
    digest = hashlib.sha256()
    for name, array in arrays:
        digest.update(f"{name}\0{array.dtype.str}\0{array.shape}\0".encode())
        digest.update(np.ascontiguousarray(array).reshape(-1).view(np.uint8).data)
    return digest.hexdigest()


def _digest(described: str, tensors: Mapping[str, NDArray[Any]]) -> str:
    text = np.frombuffer(described.encode(), np.uint8)
    return digest_of([("", text), *sorted(tensors.items())])


def _tensors(state: SavedState) -> dict[str, NDArray[Any]]:
    tensors = {_SESSION + name: np.asarray(array) for name, array in state.session.items()}
    tensors |= {_BEST + name: array for name, array in state.best.items()}
    if state.record:
        tensors[_RECORD] = np.frombuffer(state.record, np.uint8)
    return tensors


def _steps_of(path: Path) -> int:
    digits = path.stem.removeprefix("step-")
    return int(digits) if digits.isdecimal() else 0


def _read(path: Path) -> SavedState:
    entries = read_header(path, "the run cannot go on from it")
    strange = [name for name, entry in entries.items() if entry.dtype not in NUMPY_TYPES]
    metadata = read_metadata(path)
    if strange or metadata.get("format") != _FORMAT:
        raise VerificationError(f"{path}: is no state of a run of this edgetune ({metadata.get('format')!r:.60})")
    tensors = {name: read_tensor(path, entry) for name, entry in entries.items()}
    described = metadata.get("run", "")
    if metadata.get("sha256") != _digest(described, tensors):
        raise VerificationError(f"{path}: was changed or damaged since it was written")
    said = json.loads(described)
    return SavedState(
        RunIdentity(**said["identity"]),
        said["total_steps"],
        Progress(**said["progress"]),
        {name.removeprefix(_SESSION): array for name, array in tensors.items() if name.startswith(_SESSION)},
        tensors[_RECORD].tobytes() if _RECORD in tensors else b"",
        {name.removeprefix(_BEST): array for name, array in tensors.items() if name.startswith(_BEST)},
    )
