"""Who follows a training run beside the terminal: all are told the same, and at the end there is a report."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edgetune.config import FollowConfig
from edgetune.errors import EdgetuneError, UsageError
from edgetune.text.byte_size import bytes_text

if TYPE_CHECKING:
    from edgetune.training import Observer
    from edgetune.training.observer import StartInfo, StepMetrics

_RUNS = "runs"
"""Folder beside the adapter, for the files of tools."""


@contextmanager
def followed(
    screen: Observer,
    config: FollowConfig,
    output: Path,
    options: Mapping[str, Any],
) -> Iterator[Observer]:
    """The observer for a run that is shown on a screen, and followed as was asked for. At its end stands the report.

    A run that stops after its first step was begun leaves a report as well, of what it did. One that cannot be written
    then is said, and the reason for the stop stays what ends the command.

    Args:
        screen: Shows the run; it is also told where the report is, and what cannot be written.
        config: What was asked for.
        output: The adapter.
        options: Those of the run.

    Raises:
        UsageError: No report can be written there, a folder is given and no tool, or the tool cannot use it.
        MissingDependencyError: The package of the tool is not installed.
    """
    if config.log_to is None and config.log_folder is not None:
        raise UsageError(f"--log-folder {config.log_folder} means nothing without --log-to; give that as well")
    if config.report is not None:
        from edgetune.reporting import require_place

        # What is to lie in the adapter has its folder at the end.
        if config.report.parent.resolve() != output.resolve() or output.exists():
            require_place(config.report)
    with ExitStack() as stack:
        observers = [screen]
        if config.log_to is not None:
            from edgetune.reporting.tracking import tracked

            folder = output.absolute().parent / _RUNS if config.log_folder is None else config.log_folder
            name = output.absolute().name
            observers.append(stack.enter_context(tracked(config.log_to, folder, name, options, screen.on_notice)))
        with _reported(Everyone(observers), config.report, output) as everyone:
            yield everyone


@contextmanager
def _reported(everyone: Everyone, report: Path | None, output: Path) -> Iterator[Everyone]:
    try:
        yield everyone
    except EdgetuneError:
        if everyone.has_begun and report is not None:
            try:
                _write(output, report, everyone)
            except EdgetuneError as error:
                everyone.on_notice(f"no report is written: {error}")
        raise
    if report is not None:
        _write(output, report, everyone)


def _write(output: Path, report: Path, everyone: Everyone) -> None:
    from edgetune.reporting import write_report

    written = write_report([output], report)
    everyone.on_notice(f"{written.path}: the run's report, {bytes_text(written.bytes)}")


class Everyone:
    """Tells several observers.

    Args:
        observers: In the order in which they are told.
    """

    def __init__(self, observers: Sequence[Observer]) -> None:
        self._observers = observers
        self.has_begun = False
        """Whether the run came to where it may do steps."""

    def on_start(self, info: StartInfo) -> None:
        """Tell that the model is loaded."""
        self.has_begun = True
        for observer in self._observers:
            observer.on_start(info)

    def on_step(self, metrics: StepMetrics) -> None:
        """Tell of a step."""
        for observer in self._observers:
            observer.on_step(metrics)

    def on_validation(self, step: int, loss: float) -> None:
        """Tell what was measured."""
        for observer in self._observers:
            observer.on_validation(step, loss)

    def on_notice(self, text: str) -> None:
        """Tell a line."""
        for observer in self._observers:
            observer.on_notice(text)
