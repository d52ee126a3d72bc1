"""What is shown above the bar while a run is watched, and where there is no room or no character for it."""

from __future__ import annotations

import io
import os
import pty
import re
import subprocess
import sys
from contextlib import suppress
from pathlib import Path

import pytest
from rich.console import Console
from rich.progress import TextColumn

from edgetune.cli.live import LiveProgress, Watched
from edgetune.training.observer import StepMetrics
from support.golden import BUNDLE, TRAIN, VALID
from support.repository import ROOT


def watched(steps: int, first: int = 1) -> Watched:
    seen = Watched()
    seen.validation(9.0)
    for step in range(first, first + steps):
        loss = 8.0 - 7.0 * (step - first) / max(1, steps - 1)
        seen.step(StepMetrics(step, loss, 1e-4, 0.5, 64, 100.0, None, 1.0, 1.0, 92_100_000))
    seen.validation(2.0)
    seen.validation(3.0)
    return seen


def test_the_curve_falls_from_the_first_loss_to_the_last() -> None:
    title, *rows, words = watched(8).lines(columns=80)
    assert title == "loss of steps 1 to 8"
    assert rows[0] == " 8.0000 ┤█▂      "
    assert rows[-1] == " 1.0000 ┤██████▇▁"
    assert len({row.index("┤") for row in rows}) == 1
    assert words == "validation loss 9.0000 → 3.0000, lowest 2.0000; memory now 92.1 MB"


@pytest.mark.parametrize("columns", [40, 80, 300])
def test_a_long_run_fits_the_terminal(columns: int) -> None:
    title, *rows, _ = watched(50_000, first=101).lines(columns)
    assert title == "loss of steps 101 to 50,100"
    assert 0.4 * min(columns, 90) <= max(map(len, rows)) < columns


def test_a_few_steps_are_no_curve() -> None:
    assert watched(3).lines(80) == Watched().lines(80) == []


@pytest.mark.parametrize(
    ("height", "encoding", "is_shown"), [(40, "utf-8", True), (10, "utf-8", False), (40, "ascii", False)]
)
def test_a_low_terminal_and_one_without_blocks_show_the_bar_alone(height: int, encoding: str, is_shown: bool) -> None:
    raw = io.BytesIO()
    file = io.TextIOWrapper(raw, encoding=encoding)
    console = Console(file=file, force_terminal=True, width=100, height=height, color_system=None)
    with LiveProgress(TextColumn("{task.completed} done"), console=console, watched=watched(30)) as progress:
        progress.add_task("", completed=30)
    file.flush()
    text = raw.getvalue().decode(encoding)
    assert "30 done" in text
    assert ("loss of steps 1 to 30" in text) == ("█" in text) == is_shown


@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no such terminals")
def test_a_run_in_a_terminal_shows_its_curve(tmp_path: Path) -> None:
    terminal, end = pty.openpty()
    command = [sys.executable, "-m", "edgetune", "train", BUNDLE, "--data", TRAIN, "--valid", VALID]
    options = ["--output", tmp_path / "adapter", "--runtime", "onnxruntime", "--steps", "20"]
    environment = {**os.environ, "TERM": "xterm", "COLUMNS": "100", "LINES": "40", "PYTHONIOENCODING": "utf-8"}
    for name in ("NO_COLOR", "FORCE_COLOR", "CI", "TTY_COMPATIBLE", "TTY_INTERACTIVE"):
        environment.pop(name, None)
    with subprocess.Popen([*map(str, [*command, *options])], cwd=ROOT, env=environment, stderr=end) as process:
        os.close(end)
        text = b""
        with suppress(OSError):  # Linux says so once no process has the terminal any more
            while piece := os.read(terminal, 1 << 16):
                text += piece
    os.close(terminal)
    assert process.returncode == 0, text.decode()
    last = text.decode().rpartition("loss of steps 1 to 20")[2]
    assert re.search(r"\d+\.\d{4} ┤[▁▂▃▄▅▆▇█ ]{10,}", last)
    assert re.search(r"validation loss [\d.]+ → [\d.]+, lowest [\d.]+; memory now [\d.]+ MB", last)
    assert "20/20" in last
