"""The golden folder, the command line as a person calls it, and the golden training run."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from edgetune.config import TrainConfig
from edgetune.training import StartInfo, StepMetrics, TrainResult, train

GOLDEN = Path(__file__).parents[2] / "artifacts" / "golden"
BUNDLE = GOLDEN / "bundle"
ADAPTER = GOLDEN / "initial_adapter"
TRAIN, VALID = GOLDEN / "train.jsonl", GOLDEN / "valid.jsonl"
COMMAND = Path(sys.executable).with_name("edgetune")


@dataclass(frozen=True)
class Said:
    """What a command said."""

    code: int
    out: str
    err: str


def edgetune(*arguments: object) -> Said:
    """Run the installed command; whatever happens, it must not show a traceback or call an error internal."""
    environment = {key: value for key, value in os.environ.items() if key not in ("EDGETUNE_DEBUG", "PYTHONPATH")}
    done = subprocess.run(
        [str(COMMAND), *map(str, arguments)], capture_output=True, text=True, env=environment, check=False, timeout=120
    )
    said = Said(done.returncode, done.stdout, done.stderr)
    for text in (said.out, said.err):
        assert "Traceback" not in text, said
        assert "internal error" not in text, said
    return said


@dataclass
class Watcher:
    """An observer that keeps what it hears."""

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


@dataclass(frozen=True)
class Trained:
    """A run and what was heard of it."""

    result: TrainResult
    watcher: Watcher


def train_golden(bundle: Path, output: Path, options: Mapping[str, Any]) -> Trained:
    """Train the golden rows from the golden initial adapter."""
    watcher = Watcher()
    result = train(bundle, TRAIN, output, TrainConfig(**options, init_adapter=ADAPTER), valid=VALID, observer=watcher)
    return Trained(result, watcher)


def flags_of(options: Mapping[str, Any]) -> list[str]:
    """The same options as the command line takes them."""
    flags: list[str] = []
    for name, value in options.items():
        flag = name.replace("_", "-")
        flags += [f"--{flag}" if value else f"--no-{flag}"] if isinstance(value, bool) else [f"--{flag}", str(value)]
    return flags
