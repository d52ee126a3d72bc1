"""What an adapter's provenance says of the run that made it."""

from __future__ import annotations

import json
import os
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np

import edgetune
from edgetune.config import TrainConfig
from edgetune.devices.presence import this_machine
from edgetune.formats.adapter import VALIDATION_DATA, VALIDATION_GIVEN, VALIDATION_SHA256
from edgetune.machine.threads import threads_used
from edgetune.training.state import PlannedRun, RunState

_PRIVATE = (
    "force", "init_adapter", "keep_state", "pause_above_temperature", "pause_below_battery", "pause_file", "resume",
    "save_steps", "time_budget", "vitisai_config",
)  # fmt: skip
"""Neither how the folder came to its place nor a path of this machine belongs to what was learnt."""
_MOST_NAME = 200
"""Characters of what a machine calls itself."""


def provenance_of(run: PlannedRun, state: RunState) -> dict[str, str]:
    """How a run was made and what came of it."""
    config, choice, execution = run.config, run.fit.choice, run.execution
    provenance = {
        "edgetune": edgetune.__version__,
        "runtime": execution.runtime,
        "runtime_version": choice.runtime.version(),
        "plan": execution.plan,
        "threads": str(threads_used()),
        "numpy": np.__version__,
        "bundle": run.bundle.manifest.manifest_sha256,
        "options": json.dumps(told_options(run.recorded), sort_keys=True),
        "rows": str(len(run.rows.train.examples)),
        "steps": str(state.steps),
        "final_loss": repr(state.final_loss),
        "finished": datetime.now(UTC).isoformat(timespec="seconds"),
        "machine": machine_name(),
    }
    if execution.pass_rows is not None:
        provenance["pass_rows"] = str(execution.pass_rows)
    if config.init_adapter is not None:
        provenance["init_adapter"] = config.init_adapter.resolve().name
    if state.validation_losses:
        provenance["validation_loss"] = repr(state.validation_losses[-1])
    if state.best:
        provenance["best_step"] = str(state.best_step)
    if state.placements:
        provenance["placement"] = "; ".join(sorted({placement.place for placement in state.placements}))
    if state.stopped:
        provenance["stopped"] = state.stopped
    return provenance


def told_options(config: TrainConfig) -> dict[str, Any]:
    """The options of a run that may be told to whoever gets the adapter."""
    return {key: value for key, value in asdict(config).items() if key not in _PRIVATE}


def machine_name() -> str:
    """What this machine calls its board and processor, and the kind of both."""
    machine = this_machine()
    return ", ".join([*machine.names, machine.architecture, machine.system])[:_MOST_NAME]


def validation_rows(path: Path, sha256: str, output: Path) -> dict[str, str]:
    """Which rows were measured on, for `export`, which measures on them again.

    Their place is told as seen from the folder that holds the adapter and from the current one. Of a place that is
    in neither only the name is told: it is nobody's business.

    Args:
        path: The rows' file.
        sha256: Of the file when it was read.
        output: The adapter.
    """
    here = Path.cwd()
    given = Path(os.path.normpath(here / path))  # a link keeps its own name: `export` is given the same one
    path, beside = path.resolve(), output.resolve().parent
    known = Path(path.name)
    if path.is_relative_to(beside) or (path.is_relative_to(here) and beside.is_relative_to(here)):
        known = Path(os.path.relpath(path, beside))
    told = {VALIDATION_DATA: known.as_posix(), VALIDATION_SHA256: sha256}
    if given.is_relative_to(here):
        told[VALIDATION_GIVEN] = given.relative_to(here).as_posix()
    return told
