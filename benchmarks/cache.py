"""Checkpoints and bundles that are made once and used by every later sitting."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from benchmarks.checkpoints import make_checkpoint
from benchmarks.experiments import Edgetune
from benchmarks.models import Model
from benchmarks.rows import real_rows
from edgetune.config import Base
from examples.demo import OFFLINE
from examples.running import EXAMPLES

_WITHOUT_ROWS = (None, "nearest", "least-squares")
"""Quantisers that look at no rows."""
_FEW_STEPS = ("--steps", "12", "--learning-rate", "1e-3", "--warmup-steps", "4")
CONVERTER = EXAMPLES / "llama_to_phi3.py"
EDGETUNE = Path(sys.executable).with_name("edgetune")
Say = Callable[[str], None]


@dataclass(frozen=True)
class Cache:
    """A folder with a subfolder for each model. Delete it to make everything anew.

    Methods that make something raise RuntimeError when they cannot.
    """

    root: Path

    def checkpoint(self, model: Model) -> Path:
        """The Hugging Face folder of a model."""
        return self.root / model.name / "checkpoint"

    def bundle(self, model: Model, base: Base) -> Path:
        """The bundle of a model on a base."""
        return self.root / model.name / base

    def bundle_for(self, contestant: Edgetune, model: Model) -> Path:
        """The bundle of a model that a contestant trains, with all that it asks of `prepare` and `split`."""
        npu = None if contestant.npu == "none" else contestant.npu
        dora, trunk = "dora" if contestant.dora else None, "split" if contestant.trunk else None
        parts = (contestant.base, contestant.quantiser, npu, dora, trunk)
        return self.root / model.name / "-".join(filter(None, parts))

    def adapter(self, model: Model) -> Path:
        """An adapter of the real model, a few steps in."""
        return self.root / model.name / "adapter"

    def demo_bundle(self, contestant: Edgetune) -> Path:
        """The bundle of the demo's base model that a contestant trains."""
        return self.root / "demo" / (f"{contestant.base}-split" if contestant.trunk else contestant.base)

    def make_checkpoint(self, model: Model, say: Say) -> None:
        """Make a model's checkpoint unless it is there."""
        folder = self.checkpoint(model)
        if not folder.is_dir():
            say(f"Making the checkpoint of {model.name} …")
            partial = _partial(folder)
            if model.trained:
                layers = str(model.size.layers)
                _run([sys.executable, CONVERTER, "smollm2", partial, "--layers", layers])
            else:
                make_checkpoint(partial, model.size)
            partial.rename(folder)

    def make_bundle(self, model: Model, base: Base, say: Say) -> None:
        """Prepare a model on a base unless that was done."""
        folder = self.bundle(model, base)
        if not folder.is_dir():
            self.make_checkpoint(model, say)
            say(f"Preparing {model.name} on an {base} base …")
            _run(self.prepare_command(model, base, folder))

    def make_bundle_for(self, contestant: Edgetune, model: Model, say: Say) -> None:
        """Prepare a model as a contestant needs it, and split it if need be, unless that was done."""
        unsplit = replace(contestant, trunk=False)
        folder = self.bundle_for(unsplit, model)
        train = str(real_rows()[0])
        if not folder.is_dir():
            self.make_checkpoint(model, say)
            say(f"Preparing {folder.name} of {model.name} …")
            command = self.prepare_command(model, contestant.base, folder)
            calibrated = contestant.npu == "qdq" or contestant.quantiser not in _WITHOUT_ROWS
            command += ["--quantiser", contestant.quantiser] if contestant.quantiser else []
            command += ["--npu", contestant.npu] if contestant.npu != "none" else []
            command += ["--dora"] if contestant.dora else []
            _run([*command, *(["--calibration", train] if calibrated and model.trained else [])])
        if contestant.trunk and not self.bundle_for(contestant, model).is_dir():
            say(f"Splitting {folder.name} of {model.name} …")
            output = self.bundle_for(contestant, model)
            _run([EDGETUNE, "split", folder, "--data", train, "--output", output, "--quiet"])

    def make_adapter(self, model: Model, say: Say) -> None:
        """Train the real model for a few steps in float32 unless that was done."""
        if not self.adapter(model).is_dir():
            start = Edgetune("onnxruntime")
            self.make_bundle_for(start, model, say)
            say(f"Training {model.name} for a few steps …")
            places: list[str | Path] = [self.bundle_for(start, model), "--data", real_rows()[0]]
            places += ["--output", self.adapter(model)]
            _run([EDGETUNE, "train", *places, "--runtime", start.runtime, *_FEW_STEPS, "--quiet"])

    def make_demo_bundle(self, contestant: Edgetune, say: Say) -> None:
        """Train the demo's base model, prepare it as the demo does, and split it if need be, unless that was done."""
        checkpoint = self.root / "demo" / "checkpoint"
        bundle, folder = self.demo_bundle(replace(contestant, trunk=False)), self.demo_bundle(contestant)
        if not checkpoint.is_dir():
            say("Training the demo's base model …")
            partial = _partial(checkpoint)
            _run([sys.executable, EXAMPLES / "make_base.py", partial])
            partial.rename(checkpoint)
        if not bundle.is_dir():
            say(f"Preparing the demo's model on an {contestant.base} base …")
            _run(_prepare(checkpoint, contestant.base, bundle, OFFLINE.lora))
        if not folder.is_dir():
            say("Splitting the demo's model …")
            _run([EDGETUNE, "split", bundle, "--data", OFFLINE.train, "--output", folder, "--quiet"])

    def prepare_command(self, model: Model, base: Base, output: Path) -> list[str | Path]:
        """The command that makes a model's bundle of its checkpoint."""
        slots = ["--rank", str(model.rank), "--alpha", f"{model.alpha:g}", "--max-length", str(model.max_length)]
        return _prepare(self.checkpoint(model), base, output, slots)


def _prepare(checkpoint: Path, base: Base, output: Path, slots: Sequence[str]) -> list[str | Path]:
    return [EDGETUNE, "prepare", checkpoint, "--output", output, "--base", base, "--quiet", *slots]


def _partial(folder: Path) -> Path:
    """Where a folder is made before it gets its name."""
    return folder.with_name(f"{folder.name}.{os.getpid()}.partial")


def _run(command: Sequence[str | Path]) -> None:
    finished = subprocess.run(command, capture_output=True, text=True)
    if finished.returncode:
        lines = finished.stderr.strip().splitlines() or [f"exit code {finished.returncode}"]
        raise RuntimeError(f"{Path(command[0]).name}: {lines[-1]}")
