"""What Python imports from `edgetune` is there on a device, and what needs a host says so when it is called."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

import edgetune
from edgetune import MissingDependencyError, evaluate, generate, load_bundle, train
from edgetune.split import split
from support.golden import ADAPTER, BUNDLE, GOLDEN, TRAIN

PAGE = Path(__file__).parents[2] / "docs" / "python.md"
FIX = r'is not installed; this is work for a host: pip install "edgetune\[host\]"'
CALLS: dict[str, Callable[[Path], object]] = {
    "prepare": lambda output: edgetune.prepare(GOLDEN / "edgetune-golden-base", output),
    "export": lambda output: edgetune.export(BUNDLE, ADAPTER, output),
    "split": lambda output: split(BUNDLE, TRAIN, output),
}
"""What a host does."""


def test_all_names_are_there() -> None:
    assert [name for name in edgetune.__all__ if not hasattr(edgetune, name)] == []
    assert all(map(callable, (evaluate, generate, load_bundle, train)))


@pytest.mark.parametrize("name", CALLS)
def test_work_for_a_host_says_so_when_it_is_called(name: str, tmp_path: Path) -> None:
    with pytest.raises(MissingDependencyError, match=FIX):
        CALLS[name](tmp_path / "output")
    assert not (tmp_path / "output").exists()


def test_the_first_script_of_the_page_runs(tmp_path: Path) -> None:
    """What it prints where the numbers are compared is another test's."""
    script, *_ = re.findall(r"^```python\n(.*?)^```", PAGE.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL)
    (tmp_path / "artifacts").symlink_to(GOLDEN.parent, target_is_directory=True)
    (tmp_path / "learn.py").write_text(script, encoding="utf-8")
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    done = subprocess.run(
        [sys.executable, "learn.py"], cwd=tmp_path, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("validation loss")
    assert (tmp_path / "adapter" / "adapter_model.safetensors").is_file()
