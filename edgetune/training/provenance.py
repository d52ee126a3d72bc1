"""What an adapter's provenance says of the run that made it."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

import edgetune
from edgetune.config import TrainConfig
from edgetune.formats.adapter import VALIDATION_DATA, VALIDATION_GIVEN, VALIDATION_SHA256
from edgetune.machine.threads import threads_used
from edgetune.planning.choice import Choice
from edgetune.runtimes.placement import Placement

_PRIVATE = ("force", "init_adapter", "vitisai_config")
"""Neither how the folder came to its place nor a path of this machine belongs to what was learnt."""


@dataclass(frozen=True)
class Outcome:
    """What came out of a run."""

    rows: int
    """Trained on."""
    steps: int
    """That were applied."""
    final_loss: float
    validation_loss: float | None
    """The last one; none where nothing was measured."""
    placements: Sequence[Placement]
    stopped: str
    """Why the run ended early; empty when it did not."""


def provenance_of(
    bundle_sha256: str, config: TrainConfig, choice: Choice, pass_rows: int | None, outcome: Outcome
) -> dict[str, str]:
    """How a run was made and what came of it.

    Args:
        bundle_sha256: Of the bundle's manifest.
        config: How it trained.
        choice: What executed it.
        pass_rows: See `Workload.pass_rows`.
        outcome: What came out.
    """
    options = {key: value for key, value in asdict(config).items() if key not in _PRIVATE}
    provenance = {
        "edgetune": edgetune.__version__,
        "runtime": choice.name,
        "runtime_version": choice.runtime.version(),
        "plan": str(choice.plan),
        "threads": str(threads_used()),
        "numpy": np.__version__,
        "bundle": bundle_sha256,
        "options": json.dumps(options, sort_keys=True),
        "rows": str(outcome.rows),
        "steps": str(outcome.steps),
        "final_loss": repr(outcome.final_loss),
    }
    if pass_rows is not None:
        provenance["pass_rows"] = str(pass_rows)
    if config.init_adapter is not None:
        provenance["init_adapter"] = config.init_adapter.resolve().name
    if outcome.validation_loss is not None:
        provenance["validation_loss"] = repr(outcome.validation_loss)
    if outcome.placements:
        provenance["placement"] = "; ".join(sorted({placement.place for placement in outcome.placements}))
    if outcome.stopped:
        provenance["stopped"] = outcome.stopped
    return provenance


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
