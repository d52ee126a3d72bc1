"""A run as it is shown: read from the adapter that it left, or from its saved state where it is not finished."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from edgetune.describe import Description, describe, describe_contract, kind_of
from edgetune.errors import EdgetuneError, UsageError
from edgetune.formats.adapter import CONFIG, MANIFEST, RECORD
from edgetune.formats.bundle import is_there, load_manifest, verify_files
from edgetune.formats.manifest import AdapterManifest
from edgetune.formats.storage import locked, recover
from edgetune.reporting.history import History, lines_of, read_history
from edgetune.text.pulse import silent
from edgetune.training.saved_run import SavedRun, unfinished_in

UNFINISHED = "not finished"
"""What is said of a run of which only its state is there."""
_EXECUTED = {
    "runtime": "runtime",
    "runtime_version": "its version",
    "plan": "plan",
    "pass_rows": "rows of a pass",
    "placement": "placement",
    "threads": "threads",
    "machine": "machine",
    "edgetune": "edgetune",
    "numpy": "numpy",
}
"""Keys of a provenance that say what executed the run, and how people call them."""


@dataclass(frozen=True)
class Run:
    """A run and what it came to. What it does not tell is empty or none."""

    name: str
    """Last part of the adapter's path."""
    path: Path
    history: History
    options: Mapping[str, str] = field(default_factory=dict)
    """All options of `train`, by the names of `TrainConfig`'s fields."""
    executed: Mapping[str, str] = field(default_factory=dict)
    """What executed it: runtime, plan, machine, versions."""
    adapter: Mapping[str, str] = field(default_factory=dict)
    """What it trained: base, ranks, number of parameters."""
    hashes: Mapping[str, str] = field(default_factory=dict)
    """SHA-256 of what went in and came out."""
    rank: str = ""
    """Ranks and alphas in words."""
    base: str = ""
    finished: datetime | None = None
    stopped: str = ""
    """Why it ended before its last step; empty where it did not."""

    @property
    def method(self) -> str:
        """How the gradient was found; empty where that is not known."""
        return self.options.get("method", "")


@dataclass(frozen=True)
class Found:
    """An adapter below a folder."""

    path: Path
    run: Run | None
    """None where it cannot be read."""
    problem: str = ""
    """Why not; empty where it can."""
    unfinished_steps: int | None = None
    """Of a run that has left no adapter yet: how far it came."""


def read_run(path: Path) -> Run:
    """The run that made an adapter, whose every byte is verified; or one that is not finished, from its saved state.

    Args:
        path: The adapter, or where it will be.

    Raises:
        UsageError: There is neither, or the adapter has no record.
        LockedError: The run goes on right now.
        IncompatibleError: A format version that this edgetune does not read.
        VerificationError: A file is missing, changed, or not what it should be.
    """
    kind = kind_of(path)
    if kind == "nothing" and (saved := SavedRun(path)).steps() is not None:
        with locked(path):
            return _of_state(path, saved)
    if kind != "adapter":
        raise UsageError(f"{path}: no adapter here; give the folder that `edgetune train` wrote, or is to write")
    if not is_there(path / MANIFEST):
        raise UsageError(f"{path}: an adapter without {MANIFEST} has no record of its run; PEFT's have none")
    run = _of_adapter(path, describe(path))
    if not run.history.steps:
        raise UsageError(f"{path}: holds no {RECORD}, so that there is nothing to show of how it was trained")
    return run


def find_runs(folder: Path) -> Iterator[Found]:
    """The adapters in a folder and below it, and the runs that are to be gone on with; links are left out.

    Only contracts and records are read and verified, not weights, and of a run that is not finished nothing.

    Raises:
        UsageError: There is no such folder.
    """
    if not folder.is_dir():
        raise UsageError(f"{folder}: no such folder; give one that holds adapters, or folders of them")
    for place, folders, files in os.walk(folder):
        if CONFIG in files:
            folders.clear()
            yield _found(Path(place))
        for output, steps in unfinished_in(Path(place)).items():
            yield Found(output, None, unfinished_steps=steps)
        folders[:] = sorted(name for name in folders if not name.startswith("."))


def _found(path: Path) -> Found:
    try:
        recover(path)
        if not is_there(path / MANIFEST):
            return Found(path, _of_adapter(path, describe(path)))
        manifest = load_manifest(path / MANIFEST, AdapterManifest)
        record = [file for file in manifest.files if file.path == RECORD]
        verify_files(path, record)
        return Found(path, _of_adapter(path, describe_contract(path, manifest)))
    except (EdgetuneError, OSError) as error:
        return Found(path, None, str(error))


def _of_adapter(path: Path, described: Description) -> Run:
    told = described.provenance
    listed = {file.path: file.sha256 for file in described.files}
    history = History()
    # Only a record that the contract lists, which is verified: what else lies there may be a link, or a pipe.
    if described.tokenizer and RECORD in listed:
        history = read_history(lines_of(path / RECORD), str(path / RECORD))
    shape, base, tokenizer = described.lora, described.base, described.tokenizer
    hashes = dict(listed)
    hashes |= {"bundle": told.get("bundle", ""), "base": base.sha256 if base else ""}
    if tokenizer:
        hashes |= {"tokenizer": tokenizer.sha256, "chat template": tokenizer.chat_template_sha256 or ""}
    trained = {"base": f"{base.name} ({base.weights} weights)" if base and base.weights else base.name if base else ""}
    if shape:
        trained["slots"] = f"{shape.slots} on {', '.join(shape.target_modules)}"
        trained["ranks"] = shape.in_words()
        trained["parameters"] = f"{shape.parameters:,}"
    trained["rows"] = told.get("rows", "")
    return Run(
        name=path.resolve().name,
        path=path,
        history=history,
        options=_options(told.get("options", "{}")),
        executed=_executed(told),
        adapter=_filled(trained),
        hashes=_filled(hashes),
        rank=shape.in_words() if shape else "",
        base=base.name if base else "",
        finished=_date(told.get("finished", "")),
        stopped=told.get("stopped", ""),
    )


def _of_state(path: Path, saved: SavedRun) -> Run:
    state = saved.load(silent)
    if state is None:
        raise UsageError(f"{path}: the run's state went away meanwhile; try again")
    identity = state.identity
    executed = {name: str(value) for name, value in asdict(identity).items() if value is not None}
    return Run(
        name=path.resolve().name,
        path=path,
        history=read_history(state.record.splitlines(keepends=True), f"{saved.folder}: {RECORD}"),
        options={name: _shown(value) for name, value in identity.options.items()},
        executed=_executed(executed),
        hashes=_filled({"bundle": identity.bundle}),
        stopped=state.progress.stopped
        or f"{UNFINISHED}: {state.progress.steps} of {state.total_steps} steps are done, --resume goes on from there",
    )


def _options(text: str) -> dict[str, str]:
    """What a provenance says of the options; as it stands, where that is no JSON object."""
    with suppress(ValueError, RecursionError):
        value = json.loads(text)
        if isinstance(value, dict):
            return {name: _shown(each) for name, each in value.items()}
    return {"options": text}


def _shown(value: Any) -> str:
    """As a config file has it: text without quotes, `true` and `false`, and nothing for what was not given."""
    return value if isinstance(value, str) else "" if value is None else json.dumps(value, sort_keys=True)


def _executed(told: Mapping[str, str]) -> dict[str, str]:
    return _filled({name: told.get(key, "") for key, name in _EXECUTED.items()})


def _filled(facts: Mapping[str, str]) -> dict[str, str]:
    return {name: value for name, value in facts.items() if value}


def _date(text: str) -> datetime | None:
    """When it was, in UTC; none where the text does not tell."""
    with suppress(ValueError, OverflowError):
        date = datetime.fromisoformat(text)
        return date.astimezone(UTC) if date.tzinfo else None
    return None
