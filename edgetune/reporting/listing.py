"""Adapters below a folder, and runs that are not finished, a line each."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from edgetune.config import RunsConfig, RunsOrder, check_config
from edgetune.reporting.page import date_words, duration_words
from edgetune.reporting.runs import Found, Run, find_runs


@dataclass(frozen=True)
class Entry:
    """An adapter, or one that is not finished, and what is known of its run."""

    path: Path
    """As seen from the folder that was listed."""
    run: Run | None
    problem: str
    """Why it cannot be read; empty where it can."""
    unfinished_steps: int | None = None
    """Of a run that has left no adapter yet: how far it came."""

    def record(self) -> dict[str, Any]:
        """For programs; what is not known is null."""
        run = self.run
        history = None if run is None else run.history
        measured = history is not None and history.steps > 0
        first, last, best = self._validation()
        return {
            "path": str(self.path),
            "problem": self.problem or None,
            "finished": run.finished.isoformat() if run and run.finished else None,
            "base": run.base or None if run else None,
            "method": run.method or None if run else None,
            "rank": run.rank or None if run else None,
            "steps": history.steps if history and measured else self.unfinished_steps,
            "unfinished": self.unfinished_steps is not None,
            "loss": history.last("loss") if history else None,
            "first_validation_loss": first,
            "last_validation_loss": last,
            "best_validation_loss": best,
            "seconds": history.seconds if history and measured else None,
            "runtime": run.executed.get("runtime") if run else None,
            "plan": run.executed.get("plan") if run else None,
            "stopped": run.stopped or None if run else None,
        }

    def words(self) -> dict[str, str]:
        """For people; what is not known is a dash."""
        told = self.record()
        first, last, best = self._validation()
        losses = " → ".join(_loss(loss) for loss in (first, last) if loss is not None)
        lowest = "" if best is None or best == last else f", lowest {_loss(best)}"
        how = ", ".join(told[key] for key in ("method", "rank") if told[key])
        where = ", ".join(told[key] for key in ("runtime", "plan") if told[key])
        return {
            "adapter": told["path"],
            "date": date_words(self.run.finished if self.run else None)
            or ("unfinished" if told["unfinished"] else "–"),
            "base": told["base"] or "–",
            "method, rank": how or "–",
            "steps": "–" if told["steps"] is None else f"{told['steps']:,}",
            "loss": _loss(told["loss"]),
            "validation": f"{losses}{lowest}" or "–",
            "time": "–" if told["seconds"] is None else duration_words(told["seconds"]),
            "runtime, plan": "cannot be read" if self.problem else where or "–",
        }

    def _validation(self) -> tuple[float | None, float | None, float | None]:
        """Loss before the first step, after the last, and the lowest after one."""
        if self.run is None or not self.run.history.validation.points:
            return None, None, None
        history = self.run.history
        before = history.validation.first if history.validation.points[0].x == 0 else None
        return before, history.validation.last if history.best else None, history.best[1] if history.best else None


def list_runs(folder: Path, config: RunsConfig = RunsConfig()) -> list[Entry]:
    """The adapters in a folder and below it.

    Args:
        folder: Where to look; hidden folders and links are passed over.
        config: In which order they are given.

    Raises:
        UsageError: There is no such folder.
    """
    check_config(config)
    entries = [_entry(folder, found) for found in find_runs(folder)]
    return sorted(entries, key=_ORDERS[config.sort])


def _entry(folder: Path, found: Found) -> Entry:
    path = found.path.relative_to(folder)
    return Entry(found.path if path == Path() else path, found.run, found.problem, found.unfinished_steps)


def _loss(loss: float | None) -> str:
    return "–" if loss is None else f"{loss:.4f}"


def _of(key: str) -> Callable[[Entry], tuple[float, str]]:
    """The least first, and what is not known last."""

    def order(entry: Entry) -> tuple[float, str]:
        value = entry.record()[key]
        return (math.inf if value is None else value, str(entry.path))

    return order


def _newest_first(entry: Entry) -> tuple[float, str]:
    finished = entry.run.finished if entry.run else None
    return (math.inf if finished is None else -finished.timestamp(), str(entry.path))


_ORDERS: dict[RunsOrder, Callable[[Entry], tuple[float, str]]] = {
    "date": _newest_first,
    "name": lambda entry: (0.0, str(entry.path)),
    "steps": _of("steps"),
    "loss": _of("loss"),
    "validation": _of("last_validation_loss"),
    "time": _of("seconds"),
}
