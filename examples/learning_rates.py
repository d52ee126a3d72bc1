"""Try several learning rates on one bundle and say which adapter gives the held-out answers best, from Python.

    python examples/learning_rates.py bundle train.jsonl valid.jsonl adapters 1e-4 3e-4 1e-3

The bundle is verified once. Each rate leaves an adapter folder below `adapters`.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from rich.progress import Progress, TaskID

from edgetune import (
    EdgetuneError,
    Evaluation,
    Observer,
    StartInfo,
    StepMetrics,
    TrainConfig,
    evaluate,
    load_bundle,
    train,
)


class Bar(Observer):
    """Moves a bar of its own for each run.

    Args:
        progress: A started display.
        name: What the bar is called.
    """

    def __init__(self, progress: Progress, name: str) -> None:
        self._progress, self._name = progress, name
        self._task: TaskID = progress.add_task(name, total=None)

    def on_start(self, info: StartInfo) -> None:
        """Show how long the run is."""
        self._progress.update(self._task, total=info.steps)

    def on_step(self, metrics: StepMetrics) -> None:
        """Move the bar, and show the loss."""
        self._progress.update(self._task, completed=metrics.step, description=f"{self._name} loss {metrics.loss:.3f}")


def main() -> None:
    """Train once a rate, measure each adapter, and print the rates from the best to the worst."""
    parser = argparse.ArgumentParser(description="Which learning rate suits a bundle and its rows?")
    parser.add_argument("bundle", type=Path)
    parser.add_argument("data", type=Path, help="rows to train on")
    parser.add_argument("valid", type=Path, help="rows to measure on")
    parser.add_argument("output", type=Path, help="folder for the adapters")
    parser.add_argument("rates", type=float, nargs="+")
    parser.add_argument("--steps", type=int, default=100, help="optimizer steps of each run")
    asked = parser.parse_args()
    measured: dict[Path, Evaluation] = {}
    try:
        bundle = load_bundle(asked.bundle)
        base = evaluate(bundle, asked.valid)
        with Progress() as progress:
            for rate in asked.rates:
                config, bar = TrainConfig(learning_rate=rate, steps=asked.steps), Bar(progress, f"{rate:g}")
                made = train(bundle, asked.data, asked.output / f"{rate:g}", config, observer=bar)
                measured[made.path] = evaluate(bundle, asked.valid, adapter=made.path)
    except EdgetuneError as error:
        sys.exit(f"error: {error}")
    print(f"base: loss {base.loss:.3f}")
    for path in sorted(measured, key=lambda path: measured[path].loss):
        print(f"{path}: loss {measured[path].loss:.3f}, {measured[path].exact_match:.0%} answered exactly")


if __name__ == "__main__":
    main()
