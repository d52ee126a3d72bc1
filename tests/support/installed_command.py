"""The command line as a person calls it."""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

COMMAND = Path(sys.executable).with_name("edgetune")


@dataclass(frozen=True)
class Said:
    """What a command said."""

    code: int
    out: str
    err: str


def edgetune(*arguments: object) -> Said:
    """Run the installed command; whatever happens, it must not show a traceback or call an error internal."""
    environment = {key: value for key, value in os.environ.items() if key not in ("EDGETUNE_DEBUG", "PYTHONPATH")}
    done = subprocess.run(
        [str(COMMAND), *map(str, arguments)], capture_output=True, text=True, env=environment, check=False, timeout=120
    )
    said = Said(done.returncode, done.stdout, done.stderr)
    for text in (said.out, said.err):
        assert "Traceback" not in text, said
        assert "internal error" not in text, said
    return said
