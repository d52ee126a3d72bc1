"""Trains the golden bundle with the torch runtime, in one process or in several that `torchrun` starts."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from support.golden import GOLDEN
from support.repository import ROOT

OPTIONS = {
    "--steps": "20",
    "--batch-size": "3",
    "--learning-rate": "0.005",
    "--schedule": "constant",
    "--weight-decay": "0.01",
    "--max-grad-norm": "1",
}
"""Those of the golden folder's `expected.json`."""
ENVIRONMENT = {**os.environ, "PYTHONPATH": str(ROOT), "CXX": "/nonexistent", "OMP_NUM_THREADS": "1"}
"""Nothing may want a compiler."""


@dataclass(frozen=True)
class Trained:
    """What a run left and said."""

    adapter: Path
    metrics: list[dict[str, Any]]
    output: str
    errors: str

    @property
    def losses(self) -> list[float]:
        """Of each step."""
        return [step["loss"] for step in self.metrics]


def train_golden(output: Path, processes: int, *options: str, **changed: str) -> Trained:
    """Run `edgetune train` on the golden rows, from the golden adapter on.

    Args:
        output: The adapter folder.
        processes: Started by `torchrun`; for 1 there is none.
        options: Further ones.
        changed: Instead of those of `OPTIONS`.
    """
    started = [sys.executable, "-m"]
    if processes > 1:
        started += ["torch.distributed.run", "--nproc-per-node", str(processes), "--master-port", _free_port(), "-m"]
    given = OPTIONS | {f"--{name.replace('_', '-')}": value for name, value in changed.items()}
    arguments: Sequence[str] = [
        *("edgetune", "train", str(GOLDEN / "bundle"), "--data", str(GOLDEN / "train.jsonl")),
        *("--runtime", "torch", "--no-shuffle", "--init-adapter", str(GOLDEN / "initial_adapter")),
        *("--output", str(output), *options, *(word for pair in given.items() for word in pair)),
    ]
    done = subprocess.run([*started, *arguments], env=ENVIRONMENT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    metrics = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
    return Trained(output, [step for step in metrics if "loss" in step], done.stdout, done.stderr)


def _free_port() -> str:
    import socket

    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return str(probe.getsockname()[1])
