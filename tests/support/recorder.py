"""What a run says: to its observer, and in `metrics.jsonl`."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from edgetune.training.observer import StartInfo, StepMetrics


@dataclass
class Recorder:
    """An observer that keeps what it is told."""

    starts: list[StartInfo] = field(default_factory=list)
    steps: list[StepMetrics] = field(default_factory=list)
    validations: list[tuple[int, float]] = field(default_factory=list)
    notices: list[str] = field(default_factory=list)

    def on_start(self, info: StartInfo) -> None:
        self.starts.append(info)

    def on_step(self, metrics: StepMetrics) -> None:
        self.steps.append(metrics)

    def on_validation(self, step: int, loss: float) -> None:
        self.validations.append((step, loss))

    def on_notice(self, text: str) -> None:
        self.notices.append(text)


def metrics(folder: Path) -> list[dict[str, Any]]:
    """Its lines in the adapter's folder."""
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
