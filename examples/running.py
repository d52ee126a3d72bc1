"""Commands as a person types them: each is shown and run, and what fails ends the whole with its exit code."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console

EXAMPLES = Path(__file__).resolve().parent
ROOT = EXAMPLES.parent
PROGRAMS = {"edgetune": [sys.executable, "-m", "edgetune"], "python": [sys.executable]}
"""What the first word of a command stands for here."""
INTERRUPTED = 130
"""Exit code of a run that Ctrl-C ended."""

Words = Sequence[str | Path]
console = Console()


@dataclass(frozen=True)
class Shell:
    """Runs commands in a folder."""

    folder: Path

    def run(self, *words: str | Path) -> None:
        """Show and run a command."""
        self._require(subprocess.run(self._shown(words), cwd=self.folder, env=_environment()).returncode)

    def tried(self, *words: str | Path, accepted: int) -> bool:
        """The same; whether it went well. An accepted exit code does not end the whole."""
        code = subprocess.run(self._shown(words), cwd=self.folder, env=_environment()).returncode
        if code != accepted:
            self._require(code)
        return code != accepted

    def asked(self, *words: str | Path) -> dict[str, Any]:
        """Show and run a command; the JSON object in the last line that it prints."""
        command = self._shown(words)
        finished = subprocess.run(command, cwd=self.folder, env=_environment(), stdout=subprocess.PIPE)
        self._require(finished.returncode)
        answer: dict[str, Any] = json.loads(finished.stdout.splitlines()[-1])
        return answer

    def interrupted(self, *words: str | Path, line: str) -> None:
        """Run a command until it says a line that begins so, and press Ctrl-C; it has to end as interrupted."""
        with subprocess.Popen(
            self._shown(words),
            cwd=self.folder,
            env=_environment(),
            stderr=subprocess.PIPE,
            text=True,
            encoding="utf-8",
            # A job in the background ignores Ctrl-C, and so would what it starts.
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
        ) as process:
            assert process.stderr is not None
            if any(said.startswith(line) for said in process.stderr):
                process.send_signal(signal.SIGINT)
            console.print(process.stderr.read().strip(), highlight=False, markup=False)
        if process.returncode != INTERRUPTED:
            sys.exit(process.returncode or 1)

    def _shown(self, words: Words) -> list[str]:
        program, *arguments = (self._told(word) for word in words)
        console.print(f"[bold]$ {' '.join((program, *arguments))}[/bold]", highlight=False, soft_wrap=True)
        return [*PROGRAMS[program], *arguments]

    def _told(self, word: str | Path) -> str:
        """A path as one would type it in the folder."""
        return os.path.relpath(word, self.folder) if isinstance(word, Path) and word.is_absolute() else str(word)

    @staticmethod
    def _require(code: int) -> None:
        if code:
            sys.exit(code)


def _environment() -> dict[str, str]:
    """Threads wait asleep: where other programs use the cores too, waiting awake makes PyTorch many times slower."""
    return {"OMP_WAIT_POLICY": "PASSIVE", **os.environ}
