"""What shells complete."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
from click.testing import CliRunner

from edgetune.cli import VERBS, main


def completed(words: str, position: int) -> list[str]:
    """What edgetune answers a bash that asks, each without its kind."""
    asked = {"_EDGETUNE_COMPLETE": "bash_complete", "COMP_WORDS": words, "COMP_CWORD": str(position)}
    script = "from edgetune.cli import main; main(prog_name='edgetune')"
    done = subprocess.run([sys.executable, "-c", script], env=os.environ | asked, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
    return [line.partition(",")[2] for line in done.stdout.splitlines()]


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_a_shell_gets_its_script(shell: str) -> None:
    done = CliRunner().invoke(main, ["completion", shell])
    assert done.exit_code == 0
    assert f"_EDGETUNE_COMPLETE={shell}_complete" in done.stdout


def test_commands_options_and_choices_are_completed() -> None:
    assert completed("edgetune ", 1) == list(VERBS)
    assert completed("edgetune tr", 1) == ["train"]
    assert completed("edgetune train bundle --learn", 3) == ["--learning-rate"]
    assert completed("edgetune train bundle --plan re", 4) == ["recompute"]


def test_another_shell_is_refused() -> None:
    done = CliRunner().invoke(main, ["completion", "tcsh"])
    assert (done.exit_code, "'bash', 'zsh', 'fish'" in done.stderr) == (2, True)
