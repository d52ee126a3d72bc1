"""What a run measures goes into TensorBoard's or MLflow's own files on this machine while it goes on."""

from __future__ import annotations

import logging
import math
import os
import sqlite3
from collections.abc import Callable, Iterator, Mapping
from contextlib import closing, contextmanager
from datetime import UTC, datetime
from importlib import import_module
from pathlib import Path
from time import monotonic, time
from types import ModuleType
from typing import Any, Protocol

from edgetune.config import TrackingTool
from edgetune.errors import InterruptedRunError, MissingDependencyError, PausedRunError, UsageError
from edgetune.training.observer import Observer, StartInfo, StepMetrics

_MEASURED = ("loss", "learning_rate", "grad_norm", "tokens_per_second", "memory_bytes", "peak_memory_bytes")
"""Fields of a step that are written."""
_VALIDATION = "validation_loss"
_NAMES = {"tensorboard": "TensorBoard", "mlflow": "MLflow"}
_OF_ADDRESSES = frozenset("?%")
"""Characters that mean something else in the address of a database."""
_LONGEST_PARAMETER = 500
"""Characters of a setting."""


class Tracker(Protocol):
    """Writes the figures of one run."""

    def begin(self, settings: Mapping[str, str]) -> None:
        """Take what is known before the first step."""
        ...

    def write(self, step: int, values: Mapping[str, float]) -> None:
        """Take what was measured after a step."""
        ...

    def end(self, *, is_finished: bool, is_stopped: bool) -> None:
        """Flush all that was taken, and close.

        Args:
            is_finished: The run came to its end.
            is_stopped: Else: it was interrupted or paused, and did not fail.
        """
        ...


@contextmanager
def tracked(
    tool: TrackingTool, folder: Path, name: str, options: Mapping[str, Any], say: Callable[[str], None]
) -> Iterator[Observer]:
    """An observer that writes a run into a tool's files, from its first step on.

    What cannot be written is worth less than the run: it is said once, and the run goes on.

    Args:
        tool: Whose files.
        folder: Where they lie, or are to lie; many runs share it.
        name: Of the run.
        options: What is written of the settings.
        say: Takes a line.

    Raises:
        MissingDependencyError: The tool's package is not installed.
        UsageError: The tool cannot use such a folder.
    """
    tracker: Tracker = _TensorBoard(folder, name) if tool == "tensorboard" else _Mlflow(folder, name)
    tracking = _Tracking(tracker, options, _NAMES[tool], say)
    is_finished = is_stopped = False
    try:
        yield tracking
        is_finished = True
    except (InterruptedRunError, PausedRunError, KeyboardInterrupt):
        is_stopped = True
        raise
    finally:
        tracking.end(is_finished=is_finished, is_stopped=is_stopped)


class _Tracking(Observer):
    """Tells a tracker, until that fails."""

    def __init__(
        self, tracker: Tracker, options: Mapping[str, Any], title: str, say: Callable[[str], None]
    ) -> None:
        self._tracker, self._options, self._title, self._say = tracker, options, title, say
        self._has_begun = self._fails = False

    def on_start(self, info: StartInfo) -> None:
        """Take what was chosen."""
        settings = {
            **self._options,
            "runtime": info.runtime,
            "plan": info.plan,
            "rows": info.rows,
            "trainable_parameters": info.trainable_parameters,
            "learning_rate": info.learning_rate,
        }
        told = {key: str(value)[:_LONGEST_PARAMETER] for key, value in settings.items() if value is not None}
        self._has_begun = True
        self._try(lambda: self._tracker.begin(told))

    def on_step(self, metrics: StepMetrics) -> None:
        """Take a step; what is not finite is left out."""
        measured = {key: getattr(metrics, key) for key in _MEASURED}
        values = {key: float(value) for key, value in measured.items() if value is not None and math.isfinite(value)}
        self._try(lambda: self._tracker.write(metrics.step, values))

    def on_validation(self, step: int, loss: float) -> None:
        """Take a measurement."""
        if math.isfinite(loss):
            self._try(lambda: self._tracker.write(step, {_VALIDATION: loss}))

    def end(self, *, is_finished: bool, is_stopped: bool) -> None:
        """Close what was begun."""
        if self._has_begun:
            self._try(lambda: self._tracker.end(is_finished=is_finished, is_stopped=is_stopped))

    def _try(self, write: Callable[[], None]) -> None:
        if self._fails:
            return
        try:
            write()
        # Whatever it is: both tools raise errors of their own, and of the libraries that they use.
        except Exception as error:
            self._fails = True
            reason = " ".join(f"{type(error).__name__}: {error}".split())
            self._say(f"{self._title} gets nothing more of this run ({reason:.200}); the training goes on")


class _TensorBoard:
    """An event file in a folder of the run's own; a run that goes on later has another one."""

    def __init__(self, folder: Path, name: str) -> None:
        self._summary = _require("tensorboard.summary", "tensorboard")
        self._folder = folder / f"{name}-{datetime.now(UTC):%Y%m%d-%H%M%S}"

    def begin(self, settings: Mapping[str, str]) -> None:
        self._writer = self._summary.Writer(str(self._folder))

    def write(self, step: int, values: Mapping[str, float]) -> None:
        for key, value in values.items():
            self._writer.add_scalar(key, value, step)

    def end(self, *, is_finished: bool, is_stopped: bool) -> None:
        self._writer.close()


class _Mlflow:
    """A run in the database `mlflow.db` of a folder. Nothing is sent: neither to a server nor to MLflow's maker."""

    _EXPERIMENT = "edgetune"
    _EVERY_SECONDS, _MOST_KEPT = 1.0, 500
    """Figures are kept for a moment, and written together: each time the database is flushed to the disk."""

    def __init__(self, folder: Path, name: str) -> None:
        # Read by MLflow when it is imported.
        os.environ.update({"MLFLOW_DISABLE_TELEMETRY": "true", "DO_NOT_TRACK": "true"})
        self._mlflow = _require("mlflow", "mlflow")
        self._entities = _require("mlflow.entities", "mlflow")
        for library in ("sqlalchemy", "alembic"):
            _require(library, "mlflow")
        for logger in ("mlflow", "alembic"):
            logging.getLogger(logger).setLevel(logging.WARNING)
        self._folder, self._name = folder.resolve(), name
        if strange := sorted(set(str(self._folder)) & _OF_ADDRESSES):
            raise UsageError(
                f"{folder}: MLflow opens no database behind {' and '.join(strange)} in a path; choose another place"
            )
        self._kept: list[Any] = []
        self._written = monotonic()

    def begin(self, settings: Mapping[str, str]) -> None:
        self._folder.mkdir(parents=True, exist_ok=True)
        database = self._folder / "mlflow.db"
        # MLflow tries for minutes to open what cannot be written; SQLite says so at once.
        with closing(sqlite3.connect(database)) as connection:
            connection.execute("BEGIN IMMEDIATE")
        self._client = self._mlflow.MlflowClient(f"sqlite:///{database}")
        found = self._client.get_experiment_by_name(self._EXPERIMENT)
        experiment = found.experiment_id if found else self._client.create_experiment(
            self._EXPERIMENT, artifact_location=(self._folder / "artifacts").as_uri()
        )  # fmt: skip
        self._run = self._client.create_run(experiment, run_name=self._name).info.run_id
        parameters = [self._entities.Param(key, value) for key, value in settings.items()]
        self._client.log_batch(self._run, params=parameters)

    def write(self, step: int, values: Mapping[str, float]) -> None:
        now = int(time() * 1000)
        self._kept += [self._entities.Metric(key, value, now, step) for key, value in values.items()]
        if len(self._kept) > self._MOST_KEPT or monotonic() - self._written > self._EVERY_SECONDS:
            self._flush()

    def end(self, *, is_finished: bool, is_stopped: bool) -> None:
        self._flush()
        status = "FINISHED" if is_finished else "KILLED" if is_stopped else "FAILED"
        self._client.set_terminated(self._run, status)

    def _flush(self) -> None:
        self._client.log_batch(self._run, metrics=self._kept)
        self._kept, self._written = [], monotonic()


def _require(module: str, extra: str) -> ModuleType:
    """A package of an extra.

    Raises:
        MissingDependencyError: It is not installed.
    """
    try:
        return import_module(module)
    except ModuleNotFoundError as error:
        name = module.partition(".")[0]
        if (error.name or "").partition(".")[0] != name:
            name = f"{name} (its {error.name})"
        raise MissingDependencyError(
            f'{name}, for --log-to {extra}, is not installed; pip install "edgetune[{extra}]"'
        ) from None
