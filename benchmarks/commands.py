"""Experiments that are whole commands, as a person types them."""

from __future__ import annotations

import json
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
from tokenizers import Tokenizer

from benchmarks.cache import EDGETUNE, Cache
from benchmarks.experiments import DemoLoss, Edgetune, Job, Preparing, RealLoss, StartUp, Workload
from benchmarks.process import ProcessError, run_watched
from benchmarks.rows import job_rows, real_rows
from examples.demo import OFFLINE


def measure_preparing(experiment: Preparing, cache: Cache) -> dict[str, float]:
    """Prepare into a folder that is dropped again; peaks are those of the command and all that it starts."""
    with TemporaryDirectory(dir=cache.root) as scratch:
        bundle = Path(scratch) / "bundle"
        finished = run_watched(cache.prepare_command(experiment.model, experiment.base, bundle))
        sizes = {path.relative_to(bundle).as_posix(): path.stat().st_size for path in bundle.rglob("*")}
    model = sizes["model.onnx"] + sizes["model.onnx.data"]
    return {
        **finished.memory_quantities(),
        "seconds": finished.seconds,
        "bundle_bytes": sum(sizes.values()),
        "bundle_ratio": sum(sizes.values()) / model,
    }


def measure_start_up(experiment: StartUp, cache: Cache) -> dict[str, float]:
    """Train one step twice; of the second, the time from the start of the process until the step is reported."""
    bundle = cache.bundle(experiment.workload.model, experiment.contestant.base)
    with TemporaryDirectory() as scratch:
        data = Path(scratch) / "rows.jsonl"
        data.write_text(text_rows(experiment.workload, bundle), encoding="ascii")
        command = _train_command(experiment.contestant, bundle, data, Path(scratch) / "adapter")
        command += ["--force", "--steps", "1", "--batch-size", str(experiment.workload.rows)]
        run_watched(command)
        reported: list[float] = []
        finished = run_watched(
            command, on_error_line=lambda line, now: reported.append(now) if line.startswith("step 1/") else None
        )
    if not reported:
        raise ProcessError("edgetune train did not report its first step")
    return {**finished.memory_quantities(), "first_step_after": reported[0], "seconds": finished.seconds}


def measure_demo_loss(experiment: DemoLoss, cache: Cache, seed: int) -> dict[str, float]:
    """Train as the demo does, with this seed; validation loss on its held-out rows, before and after."""
    bundle = cache.demo_bundle(experiment.contestant)
    with TemporaryDirectory() as scratch:
        train = _train_command(experiment.contestant, bundle, OFFLINE.train, Path(scratch) / "adapter")
        train += ["--valid", OFFLINE.valid, *OFFLINE.training, "--seed", str(seed), "--quiet", "--json"]
        if experiment.learning_rate is not None:
            train += ["--learning-rate", str(experiment.learning_rate)]
        finished = run_watched(train)
    return {**finished.memory_quantities(), **_losses(json.loads(finished.stdout))}


def measure_real_loss(experiment: RealLoss, cache: Cache) -> dict[str, float]:
    """Validation loss of the real model, before and after the steps; of the base alone where there are none."""
    bundle, (train, valid) = cache.bundle_for(experiment.contestant, experiment.model), real_rows()
    if not experiment.steps:
        finished = run_watched([EDGETUNE, "eval", bundle, "--data", valid, "--quiet", "--json"])
        return {"first_validation_loss": json.loads(finished.stdout)["loss"]}
    with TemporaryDirectory() as scratch:
        command = _train_command(experiment.contestant, bundle, train, Path(scratch) / "adapter")
        command += ["--valid", valid, "--learning-rate", "1e-3", "--warmup-steps", "10"]
        command += ["--steps", str(experiment.steps), "--seed", "0", "--quiet", "--json"]
        return _losses(json.loads(run_watched(command).stdout))


def measure_job(experiment: Job, contestant: Edgetune, cache: Cache) -> dict[str, float]:
    """The job with edgetune's defaults: the lowest validation loss, and the time of the steps up to it."""
    with TemporaryDirectory() as scratch:
        train, valid = job_rows(Path(scratch))
        output = Path(scratch) / "adapter"
        command = _train_command(contestant, cache.bundle_for(contestant, experiment.model), train, output)
        command += ["--learning-rate", str(experiment.learning_rate)] if experiment.learning_rate else []
        finished = run_watched([*command, "--valid", valid, "--quiet", "--json"])
        lines = (output / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    steps = [json.loads(line) for line in lines]
    seconds = np.cumsum([step["tokens"] / step["tokens_per_second"] for step in steps]).tolist()
    measured = ((step.get("validation_loss"), spent) for step, spent in zip(steps, seconds, strict=True))
    lowest, spent = min((loss, spent) for loss, spent in measured if loss is not None)
    before = json.loads(finished.stdout)["first_validation_loss"]
    memory = finished.memory_quantities()
    return {**memory, "first_validation_loss": before, "validation_loss": lowest, "seconds": spent}


def _losses(result: dict[str, float]) -> dict[str, float]:
    """What a training's result says of its validation."""
    before, after = result["first_validation_loss"], result["last_validation_loss"]
    return {
        "first_validation_loss": before,
        "validation_loss": after,
        "loss_drop": before - after,
        "seconds": result["seconds"],
    }


def _train_command(contestant: Edgetune, bundle: Path, data: Path, output: Path) -> list[str | Path]:
    plan = ["--plan", contestant.plan, "--precision", contestant.precision]
    plan += ["--trunk"] if contestant.trunk else []
    budget = ["--memory-budget", contestant.memory_budget] if contestant.memory_budget else []
    paths: list[str | Path] = [EDGETUNE, "train", bundle, "--data", data, "--output", output]
    return [*paths, "--runtime", contestant.runtime, *plan, *budget]


def text_rows(workload: Workload, bundle: Path) -> str:
    """Rows of random letters, as JSONL, that have the workload's length in the bundle's tokens."""
    tokenizer = Tokenizer.from_file(str(bundle / "tokenizer.json"))
    generator = np.random.default_rng(0)
    rows = []
    for _ in range(workload.rows):
        letters = bytes(generator.integers(ord("a"), ord("z") + 1, 8 * workload.length).tolist()).decode()
        # The end of the sequence is a token as well.
        end = tokenizer.encode(letters, add_special_tokens=False).offsets[workload.length - 2][1]
        rows.append(json.dumps({"text": letters[:end]}) + "\n")
    return "".join(rows)
