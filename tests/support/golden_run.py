"""The golden training run."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from edgetune.config import TrainConfig
from edgetune.training import TrainResult, train
from support.golden import ADAPTER, TRAIN, VALID
from support.recorder import Recorder


@dataclass(frozen=True)
class Trained:
    """A run and what was heard of it."""

    result: TrainResult
    recorder: Recorder


def train_golden(bundle: Path, output: Path, options: Mapping[str, Any]) -> Trained:
    """Train the golden rows from the golden initial adapter."""
    recorder = Recorder()
    result = train(bundle, TRAIN, output, TrainConfig(**options, init_adapter=ADAPTER), valid=VALID, observer=recorder)
    return Trained(result, recorder)


def flags_of(options: Mapping[str, Any]) -> list[str]:
    """The same options as the command line takes them."""
    flags: list[str] = []
    for name, value in options.items():
        flag = name.replace("_", "-")
        flags += [f"--{flag}" if value else f"--no-{flag}"] if isinstance(value, bool) else [f"--{flag}", str(value)]
    return flags
