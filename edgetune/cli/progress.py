"""How a training run is shown: a curve and a bar on a terminal that can move them, plain lines elsewhere; on stderr."""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import IO, TYPE_CHECKING, cast

from edgetune.cli.interruption import raise_if_interrupted
from edgetune.cli.output import LastingStderr, notices
from edgetune.text.byte_size import bytes_text

if TYPE_CHECKING:
    from rich.console import Console
    from rich.progress import Progress, TaskID

    from edgetune.cli.live import Watched
    from edgetune.training import Observer
    from edgetune.training.observer import StartInfo, StepMetrics

LINES = 100
"""Steps that plain lines show at most; `metrics.jsonl` has all of them."""


@contextmanager
def shown(*, quiet: bool) -> Iterator[Observer]:
    """The observer for this stderr, closed at the end of the run however it ends."""
    if quiet or not sys.stderr.isatty():
        yield LineObserver(notices(quiet=quiet))
        return
    from rich.console import Console

    terminal = Console(file=cast(IO[str], LastingStderr()), highlight=False)
    if not _moves(terminal):
        yield LineObserver(notices(quiet=False))
        return
    from rich.progress import BarColumn, MofNCompleteColumn, TextColumn

    from edgetune.cli.live import LiveProgress, Watched

    columns = (TextColumn("train"), BarColumn(None), MofNCompleteColumn(), TextColumn("{task.description}"))
    watched = Watched()
    with LiveProgress(*columns, console=terminal, watched=watched) as progress:
        yield BarObserver(progress, watched)


def _moves(terminal: Console) -> bool:
    """Whether rich redraws a bar there (not where `TERM` is `dumb`); otherwise it would show nothing until the end."""
    return terminal.is_terminal and terminal.is_interactive and not terminal.is_dumb_terminal


class LineObserver:
    """Writes lines. An interruption that a library lost ends the command at the next step.

    Args:
        say: Takes one line.
    """

    def __init__(self, say: Callable[[str], None]) -> None:
        self._say = say
        self._steps = 1

    def on_start(self, info: StartInfo) -> None:
        """Say what will be trained."""
        self._steps = info.steps
        self._say(start_text(info))

    def on_step(self, metrics: StepMetrics) -> None:
        """Write the first step, the last, and evenly many between."""
        raise_if_interrupted()
        every = math.ceil(self._steps / LINES)
        if metrics.step == 1 or metrics.step % every == 0 or metrics.step == self._steps:
            self._say(f"step {metrics.step}/{self._steps}: {step_text(metrics)}")

    def on_validation(self, step: int, loss: float) -> None:
        """Write the validation loss."""
        self._say(validation_text(step, loss))

    def on_notice(self, text: str) -> None:
        """Write it."""
        self._say(text)


class BarObserver:
    """Moves a progress bar; all else is printed above it. A lost interruption ends the command here, too.

    Args:
        progress: A started rich display.
        watched: What the display shows above its bar.
    """

    def __init__(self, progress: Progress, watched: Watched) -> None:
        self._progress, self._watched = progress, watched
        self._task: TaskID | None = None

    def on_start(self, info: StartInfo) -> None:
        """Say what will be trained, and show an empty bar."""
        self._print(start_text(info))
        self._task = self._progress.add_task("", total=info.steps)

    def on_step(self, metrics: StepMetrics) -> None:
        """Move the bar."""
        raise_if_interrupted()
        self._watched.step(metrics)
        if self._task is not None:
            self._progress.update(self._task, completed=metrics.step, description=step_text(metrics))

    def on_validation(self, step: int, loss: float) -> None:
        """Print the validation loss."""
        self._watched.validation(loss)
        self._print(validation_text(step, loss))

    def on_notice(self, text: str) -> None:
        """Print it."""
        self._print(text)

    def _print(self, text: str) -> None:
        raise_if_interrupted()
        self._progress.console.print(text, markup=False)


def start_text(info: StartInfo) -> str:
    """What will be trained, in one line."""
    tokens = f"{info.tokens_per_epoch:,} tokens, {info.trained_tokens_per_epoch:,} of them trained"
    if round(100 * info.shared_prefixes):
        tokens += f", {info.shared_prefixes:.0%} saved by common prefixes"
    epochs = f"{info.steps} steps ({info.steps_per_epoch} an epoch), learning rate {info.learning_rate:g}"
    on = "" if info.first_step == 1 else f"going on with step {info.first_step}: "
    what = f"{info.rows} rows ({tokens}), {epochs}, {info.trainable_parameters:,} parameters"
    kept = f", {info.kept}" if info.kept else ""
    return f"{on}{what}, {_plan_text(info)}{kept}, state saved {info.saved}"


def _plan_text(info: StartInfo) -> str:
    peak = info.predicted_peak_memory_bytes
    passes = passes_text(info.pass_rows, info.batch_size)
    memory = "" if peak is None else f"about {bytes_text(peak)}"
    return f"on {info.runtime} ({', '.join(filter(None, (info.plan, passes, memory)))})"


def passes_text(pass_rows: int | None, batch_size: int) -> str:
    """How much of a batch goes through the model at a time; empty where it is all of it, or buckets say it."""
    if pass_rows is None or pass_rows >= batch_size:
        return ""
    return f"room for {pass_rows} row{'s' if pass_rows > 1 else ''} at a time"


def step_text(metrics: StepMetrics) -> str:
    """A step's figures: loss, learning rate, tokens a second, time to go, peak memory."""
    peak = "" if metrics.peak_memory_bytes is None else f", peak {bytes_text(metrics.peak_memory_bytes)}"
    rate = f"lr {metrics.learning_rate:.2e}, {metrics.tokens_per_second:,.0f} tokens/s"
    return f"loss {metrics.loss:.4f}, {rate}, ETA {duration_text(metrics.eta_seconds)}{peak}"


def validation_text(step: int, loss: float) -> str:
    """Validation loss, in one line."""
    return f"validation loss {loss:.4f} {'before training' if step == 0 else f'after step {step}'}"


def duration_text(seconds: float) -> str:
    """`h:mm:ss`; `?` for what is no time."""
    if not 0 <= seconds < timedelta.max.total_seconds():
        return "?"
    return str(timedelta(seconds=round(seconds)))
