"""What `edgetune plan` predicts against what `edgetune train` then takes: `python -m benchmarks.preflight BUNDLE…`.

Each case is planned and trained right after each other, in processes of their own, because machines are noisy. Printed:
a table of peak memory, usual step and whole run, predicted and measured. The exit code is 1 where one is off by more
than the documentation says.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np

MEMORY, TIME = 0.15, 0.30
"""How far a prediction may be off."""
_WORDS = ("lamp", "kitchen", "turn", "it", "off", "and", "tell", "me", "the", "answer", "hello", "world")

_CPU_TIME = """
import os, time
os.sched_setaffinity(0, {max(os.sched_getaffinity(0))})
time.perf_counter = time.process_time
from edgetune.cli import main
main()
"""
"""edgetune with another clock, which other processes do not disturb as much."""


@dataclass(frozen=True)
class Case:
    """A run."""

    bundle: Path
    data: Path
    options: tuple[str, ...]


@dataclass(frozen=True)
class Compared:
    """A quantity."""

    name: str
    predicted: float
    measured: float
    tolerance: float

    @property
    def error(self) -> float:
        """Of the prediction, relative to what was measured."""
        return self.predicted / self.measured - 1

    def __str__(self) -> str:
        """As the table has it."""
        return f"{self.predicted:.3g} / {self.measured:.3g} ({self.error:+.0%})"


def cases(bundles: Sequence[Path], data: Path | None, folder: Path, asked: argparse.Namespace) -> Iterator[Case]:
    """Every bundle with every runtime, plan, batch and length of rows."""
    for bundle in bundles:
        for words in [0] if data else asked.words:
            rows = data or _write_rows(folder / f"{words}.jsonl", words)
            for runtime, plan, batch in product(asked.runtimes, asked.plans, asked.batch_sizes):
                options = ["--runtime", runtime, "--plan", plan, "--batch-size", str(batch)]
                yield Case(bundle, rows, (*options, "--steps", str(asked.steps), "--truncate"))


def compare(case: Case, folder: Path, edgetune: Sequence[str]) -> tuple[list[Compared], dict[str, Any]]:
    """Plan, then train."""
    planned = _run(edgetune, "plan", case.bundle, "--data", case.data, *case.options)
    output = folder / "adapter"
    trained = _run(edgetune, "train", case.bundle, "--data", case.data, "--output", output, "--force", *case.options)
    lines = [json.loads(line) for line in (output / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    usual = median(line["tokens"] / line["tokens_per_second"] for line in lines)
    found = [
        Compared("usual step, s", planned["step_seconds"], usual, TIME),
        Compared("run, s", planned["run_seconds"], trained["seconds"], TIME),
    ]
    if planned["peak_memory_bytes"] is not None:
        memory = Compared("peak, MB", planned["peak_memory_bytes"] / 1e6, trained["peak_memory_bytes"] / 1e6, MEMORY)
        found.insert(0, memory)
    return found, planned


def _run(edgetune: Sequence[str], *arguments: object) -> dict[str, Any]:
    command = [*edgetune, *map(str, arguments), "--json"]
    finished = subprocess.run(command, capture_output=True, text=True)
    if finished.returncode:
        sys.exit(f"{' '.join(command)}: {finished.stderr.strip() or finished.stdout.strip()}")
    answer: dict[str, Any] = json.loads(finished.stdout)
    return answer


def _write_rows(path: Path, words: int) -> Path:
    generator = np.random.default_rng(0)
    rows = (" ".join(generator.choice(_WORDS, words)) for _ in range(64))
    path.write_text("".join(json.dumps({"text": row}) + "\n" for row in rows), encoding="utf-8")
    return path


def main() -> None:
    """Run the cases and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bundles", nargs="+", type=Path)
    parser.add_argument("--data", type=Path, help="rows; without them random words")
    parser.add_argument("--words", type=int, nargs="+", default=[40, 160])
    parser.add_argument("--runtimes", nargs="+", default=["onnxruntime", "openvino"])
    parser.add_argument("--plans", nargs="+", default=["auto", "stream"])
    parser.add_argument("--batch-sizes", type=int, nargs="+", default=[1, 4])
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--cpu-time", action="store_true", help="one core, its processor time as the clock")
    asked = parser.parse_args()
    edgetune = [sys.executable, *(("-c", _CPU_TIME) if asked.cpu_time else ("-m", "edgetune"))]
    off = total = 0
    with TemporaryDirectory() as name:
        for case in cases(asked.bundles, asked.data, Path(name), asked):
            compared, planned = compare(case, Path(name), edgetune)
            off += sum(abs(each.error) > each.tolerance for each in compared)
            total += len(compared)
            options = " ".join(case.options[1:6:2])
            shapes = " ".join(f"{each['sequences']}×{each['length']}" for each in planned["shapes"][:3])
            said = " | ".join(map(str, compared))
            name_of = f"{case.bundle.parent.name}/{case.bundle.name} {case.data.stem}"
            print(f"| {name_of} | {options} | {shapes} | {said} |", flush=True)
    print(f"{total - off} of {total} within {MEMORY:.0%} (memory) and {TIME:.0%} (time)")
    sys.exit(1 if off else 0)


if __name__ == "__main__":
    main()
