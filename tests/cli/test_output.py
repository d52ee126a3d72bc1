"""What a file says cannot steer the terminal that it is shown on, and every terminal shows how a run goes on."""

from __future__ import annotations

import json
import os
import select
import shutil
import subprocess
import sys
import time
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import pytest
from click.testing import CliRunner
from onnx import TensorProto, helper
from safetensors.numpy import load_file, save_file

from edgetune.cli import main
from edgetune.cli.failures import DEBUG, tell_failure
from edgetune.cli.output import notices
from edgetune.errors import VerificationError
from edgetune.formats.bundle import MANIFEST, load_manifest, seal_bundle
from edgetune.formats.manifest import BundleManifest, Graph
from support.described_folders import make_adapter, make_bundle
from support.device_profile import PROFILE
from support.golden import GOLDEN
from support.repository import ROOT

EVIL = "\x1b[2J\u202e[/red]"
SHOWN = "\\x1b[2J\\u202e[/red]"


def shown(*arguments: object, code: int = 0) -> str:
    """What a command writes for people, none of which steers anything."""
    done = CliRunner().invoke(main, [*map(str, arguments)], color=False)
    assert done.exit_code == code, done.output
    assert not set(done.output) & {"\x1b", "\u202e"}, done.output
    return "".join(done.output.split())


@pytest.mark.parametrize("debug", [False, True])
def test_errors_show_what_they_name(
    debug: bool, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(DEBUG, "1" if debug else "")
    assert tell_failure(VerificationError(f"{EVIL}: was changed\nsecond"), as_json=True) == 5
    out, err = capsys.readouterr()
    assert err.endswith(f"error: {SHOWN}: was changed\nsecond\n")
    assert ("Traceback" in err or "VerificationError" in err) == debug
    assert "\x1b" not in err
    assert json.loads(out)["error"]["message"] == f"{EVIL}: was changed\nsecond"


def test_notices_show_what_they_name(capsys: pytest.CaptureFixture[str]) -> None:
    notices(quiet=False)(f"reading {EVIL}")
    assert capsys.readouterr().err == f"reading {SHOWN}\n"


def test_an_adapter_of_somebody_is_inspected(tmp_path: Path) -> None:
    adapter = make_adapter(tmp_path / "adapter")
    (adapter / "edgetune.json").unlink()
    (adapter / "\x1b]0;title\x07").write_text("")
    config = json.loads((adapter / "adapter_config.json").read_text())
    changed = {"base_model_name_or_path": f"\ud800{EVIL}", "target_modules": [EVIL]}
    (adapter / "adapter_config.json").write_text(json.dumps(config | changed))
    text = shown("inspect", adapter)
    assert f"base\\ud800{SHOWN}" in text
    assert f"on{SHOWN}" in text
    assert "\\x1b]0;title\\x07" in text


def test_a_bundle_of_somebody_is_inspected(tmp_path: Path) -> None:
    folder = make_bundle(tmp_path / "bundle")
    manifest = load_manifest(folder / MANIFEST, BundleManifest)
    (folder / MANIFEST).unlink()
    graphs = [Graph(EVIL, "step.onnx", [], [])]
    seal_bundle(folder, replace(manifest, graphs=graphs, provenance={EVIL: EVIL}))
    text = shown("inspect", folder)
    assert f"│{SHOWN}│step.onnx" in text
    assert f"madewith{SHOWN}{SHOWN}" in text


def test_tensors_of_an_adapter_are_named(tmp_path: Path) -> None:
    adapter = Path(shutil.copytree(GOLDEN / "initial_adapter", tmp_path / "adapter"))
    weights = adapter / "adapter_model.safetensors"
    save_file(load_file(weights) | {EVIL: np.zeros(1, np.float32)}, weights)
    arguments = ("eval", GOLDEN / "bundle", "--data", GOLDEN / "valid.jsonl", "--adapter", adapter)
    assert SHOWN in shown(*arguments, code=4)


def test_a_profile_of_somebody_is_shown_and_checked(tmp_path: Path) -> None:
    evil = EVIL.replace("\x1b", "\\u001b").replace("\u202e", "\\u202e")
    path = tmp_path / "my-board.toml"
    path.write_text(PROFILE.replace("My board", evil).replace("data sheet", evil).replace("static shapes only", evil))
    text = shown("devices", "show", path)
    assert f"title:{SHOWN}" in text
    assert text.count(SHOWN) == 4
    path.write_text(PROFILE.replace("QNNExecutionProvider", evil).replace("pip install it", evil))
    assert f"{SHOWN}:nothere" in shown("devices", "check", path)


RUN = """
import os, sys
from edgetune.cli.progress import shown
from edgetune.training.observer import StartInfo, StepMetrics
with shown(quiet=False) as observer:
    observer.on_start(StartInfo("onnxruntime", "a plan", 4, None, 4, 3, 1, 5, 1, 0, 2, 1200, 300, 4096, 2e-4))
    observer.on_step(StepMetrics(1, 1.0, 1e-4, 0.5, 64, 100.0, None, 1.0))
    # Whoever watches the terminal now has seen what this long run has said so far.
    os.write(1, b"waiting\\n")
    sys.stdin.readline()
    for step in (2, 3):
        observer.on_step(StepMetrics(step, 1.0, 1e-4, 0.5, 64, 100.0, None, 1.0))
"""
STEP = "loss 1.0000, lr 1.00e-04, 100 tokens/s, ETA 0:00:01"


def shown_by(terminal: int) -> str:
    """What was written to a terminal since the last time, and is written within half a second."""
    text, end = b"", time.monotonic() + 0.5
    # Linux says EIO once no process has the terminal any more.
    with suppress(OSError):
        while select.select([terminal], [], [], max(0.0, end - time.monotonic()))[0]:
            text += os.read(terminal, 1 << 16)
    return text.decode()


def watched_run(**environment: str) -> tuple[str, str]:
    """What a terminal shows of a run after its first step, and at its end."""
    terminal, end = os.openpty()
    names = {"TERM", "NO_COLOR", "FORCE_COLOR", "CI", "TTY_COMPATIBLE", "TTY_INTERACTIVE"}
    clean = {name: value for name, value in os.environ.items() if name not in names}
    with subprocess.Popen(
        [sys.executable, "-c", RUN],
        env={**clean, "PYTHONPATH": str(ROOT), "COLUMNS": "150", **environment},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=end,
        text=True,
    ) as process:
        os.close(end)
        assert process.stdin is not None and process.stdout is not None
        assert process.stdout.readline() == "waiting\n"
        early = shown_by(terminal)
        process.communicate("\n", timeout=30)
        late = shown_by(terminal)
    os.close(terminal)
    assert process.returncode == 0
    return early, late


@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no such terminals")
@pytest.mark.parametrize(
    "environment",
    [
        {"TERM": "dumb"},
        {"TERM": "unknown"},
        {"TERM": "dumb", "TTY_INTERACTIVE": "1"},
        {"TERM": "xterm", "TTY_COMPATIBLE": "0"},
        {"TERM": "xterm", "TTY_INTERACTIVE": "0"},
        {"TERM": "xterm", "FORCE_COLOR": ""},
    ],
    ids=lambda each: " ".join(f"{name}={value}" for name, value in each.items()),
)
def test_a_terminal_on_which_nothing_moves_gets_plain_lines(environment: dict[str, str]) -> None:
    early, late = watched_run(**environment)
    assert early.splitlines()[1:] == [f"step 1/3: {STEP}"]
    assert late.splitlines() == [f"step 2/3: {STEP}", f"step 3/3: {STEP}"]


@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no such terminals")
@pytest.mark.parametrize("environment", [{}, {"NO_COLOR": "1"}, {"CI": "true"}])
def test_other_terminals_keep_their_bar(environment: dict[str, str]) -> None:
    early, late = watched_run(TERM="xterm", **environment)
    assert "\x1b[?25l" in early
    assert "step 1/3" not in early + late
    assert "3/3" in late
    assert STEP in late


def test_nodes_of_a_graph_are_named(tmp_path: Path) -> None:
    x, y = (helper.make_tensor_value_info(name, TensorProto.FLOAT, [1, 2]) for name in ("x", "y"))
    graph = helper.make_graph([helper.make_node("Einsum", ["x"], ["y"], name=EVIL, equation="ij->ij")], "g", [x], [y])
    onnx.save(helper.make_model(graph), tmp_path / "graph.onnx")
    assert SHOWN in shown("conformance", tmp_path / "graph.onnx", code=4)
