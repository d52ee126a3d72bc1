"""Forward-only training beside backpropagation: `python -m benchmarks.forward_only BUNDLE --data FILE --valid FILE`.

Every run is the `edgetune` command in a fresh process, on the same bundle, rows and batch size. Two tables are printed:
the highest resident memory of backpropagation, of forward-only training and of measuring the same rows' loss, with each
runtime; and how far the validation loss falls, against steps and passes through the model. `make demo DEMO=offline`
leaves a bundle in `demo/offline/bundle`, and its rows are in `examples/device_assistant/`.
"""

from __future__ import annotations

import json
import sys
from argparse import ArgumentParser, Namespace
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from rich.console import Console
from rich.table import Table

from benchmarks.edgetune_worker import fit
from benchmarks.experiments import Edgetune
from benchmarks.process import Finished, run_watched
from edgetune.config import Method, PlanName, RuntimeName, TrainConfig
from edgetune.data.encode import load_encoder
from edgetune.data.examples import load_examples
from edgetune.formats.bundle import load_bundle
from edgetune.model.lora import initial_parameters
from edgetune.runtimes.forward_only import passes_a_step

GOAL = 0.8
"""Share of backpropagation's loss drop."""
MOST_STEPS = 20
"""Times its steps."""
MEMORY_STEPS = 9
"""An epoch of the demo's rows, so that every shape of batch occurs."""
RUNTIMES: tuple[tuple[RuntimeName, PlanName], ...] = (
    ("onnxruntime", "whole"),
    ("onnxruntime", "auto"),
    ("onnxruntime", "stream"),
    ("openvino", "auto"),
)
CURVE = 20
"""Rows of the curve."""
_A_DAY = 86400.0


@dataclass(frozen=True)
class Run:
    """One `edgetune train`."""

    result: dict[str, Any]
    """What it printed."""
    steps: list[dict[str, Any]]
    """Its `metrics.jsonl`."""
    finished: Finished

    @property
    def drop(self) -> float:
        """By how much the validation loss fell."""
        return float(self.result["first_validation_loss"] - self.result["last_validation_loss"])


def train(asked: Namespace, method: Method, options: Sequence[object]) -> Run:
    """Train with a method in a fresh process."""
    with TemporaryDirectory() as folder:
        output = Path(folder) / "adapter"
        command = [sys.executable, "-m", "edgetune", "train", asked.bundle, "--data", asked.data, "--output", output]
        command += ["--batch-size", asked.batch_size, "--learning-rate", asked.learning_rate, "--schedule", "linear"]
        command += ["--warmup-steps", asked.warmup_steps, "--method", method, *options, "--quiet", "--json"]
        finished = run_watched([str(word) for word in command], time_limit=_A_DAY)
        lines = (output / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    return Run(json.loads(finished.stdout), [json.loads(line) for line in lines], finished)


def memory(asked: Namespace, console: Console) -> None:
    """Print the peaks of an epoch with each runtime and plan."""
    table = Table("runtime", "plan", "backpropagation", "forward-only", "measuring alone", "predicted")
    asked = Namespace(**{**vars(asked), "warmup_steps": 0})
    for runtime, plan in RUNTIMES:
        options = ["--runtime", runtime, "--plan", plan, "--steps", MEMORY_STEPS]
        exact = train(asked, "backpropagation", options)
        estimated = train(asked, "forward-only", [*options, "--queries", 2])
        worker = [sys.executable, "-m", "benchmarks.forward_only", asked.bundle, "--data", asked.data]
        worker += ["--batch-size", str(asked.batch_size), "--measure", runtime, plan]
        measured = run_watched(worker)
        peaks = [each.memory.resident for each in (exact.finished, estimated.finished, measured)]
        predicted = estimated.result["predicted_peak_memory_bytes"]
        table.add_row(runtime, plan, *(f"{peak / 1e6:.1f} MB" for peak in peaks), _megabytes(predicted))
    console.print(table)


def measure(asked: Namespace) -> None:
    """Measure the loss of all rows and do nothing else."""
    runtime, plan = asked.measure
    bundle = load_bundle(asked.bundle)
    manifest = bundle.manifest
    rows = load_examples(asked.data, load_encoder(bundle.path, manifest.tokenizer), manifest.max_length, truncate=False)
    contestant = Edgetune(runtime, plan)
    fitted = fit(contestant, bundle, rows.examples, asked.batch_size, packing=True, method="forward-only")
    parameters = initial_parameters(manifest.lora, seed=0)
    open_forward = fitted.choice.runtime.open_forward
    assert open_forward is not None, "planning chose it for forward-only training"
    with open_forward(bundle, parameters, fitted.choice.plan) as forward:
        for batches in fitted.workload.steps():
            for batch in batches:
                forward.evaluate(batch)


def learn(asked: Namespace, console: Console) -> bool:
    """Train both ways and print how far each came; tells whether every seed reached the goal."""
    steps = asked.steps * MOST_STEPS
    queries = TrainConfig.queries if asked.queries is None else asked.queries
    exact = train(asked, "backpropagation", ["--valid", asked.valid, "--steps", asked.steps])
    table = Table("method", "seed", "steps", "passes a step", "validation loss", "drop", "seconds", "peak memory")
    table.add_row("backpropagation", "0", f"{asked.steps:,}", "1 and a backward pass", *_row(exact, exact))
    met = []
    for seed in range(asked.seeds):
        options = ["--valid", asked.valid, "--steps", steps, "--queries", queries, "--seed", seed]
        found = train(asked, "forward-only", options)
        table.add_row("forward-only", str(seed), f"{steps:,}", str(passes_a_step(queries)), *_row(found, exact))
        met.append(found.drop >= GOAL * exact.drop)
        curve = Table("step", "passes", "validation loss", "share of the drop")
        first = found.result["first_validation_loss"]
        measured = [step for step in found.steps if "validation_loss" in step]
        for step in measured[:: max(1, len(measured) // CURVE)]:
            loss, share = step["validation_loss"], (first - step["validation_loss"]) / exact.drop
            curve.add_row(
                f"{step['step']:,}", f"{step['step'] * passes_a_step(queries):,}", f"{loss:.3f}", f"{share:.0%}"
            )
        console.print(curve)
    console.print(table)
    return all(met)


def _row(run: Run, exact: Run) -> list[str]:
    result = run.result
    losses = f"{result['first_validation_loss']:.3f} → {result['last_validation_loss']:.3f}"
    return [
        losses, f"{run.drop / exact.drop:.0%}", f"{result['seconds']:.0f}", _megabytes(run.finished.memory.resident)
    ]  # fmt: skip


def _megabytes(size: int | None) -> str:
    return "" if size is None else f"{size / 1e6:.1f} MB"


def main() -> None:
    """Measure and print; exit code 1 when the goal is missed."""
    parser = ArgumentParser(prog="python -m benchmarks.forward_only", description=__doc__)
    parser.add_argument("bundle", type=Path)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--valid", type=Path)
    parser.add_argument("--steps", type=int, default=50, help="of backpropagation; 300 take hours")
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--learning-rate", type=float, default=3e-3)
    parser.add_argument("--warmup-steps", type=int, default=10)
    parser.add_argument("--queries", type=int, help="of a forward-only step; the default of `edgetune train`")
    parser.add_argument("--seeds", type=int, default=1, help="of forward-only training; 0 prints memory alone")
    parser.add_argument("--measure", nargs=2, metavar=("RUNTIME", "PLAN"), help="be the process that measures alone")
    asked = parser.parse_args()
    if asked.measure:
        measure(asked)
        return
    console = Console(width=120)
    memory(asked, console)
    if asked.seeds and asked.valid is None:
        parser.error("--valid is needed to see how far the loss falls; or give --seeds 0")
    if asked.seeds and not learn(asked, console):
        sys.exit(1)


if __name__ == "__main__":
    main()
