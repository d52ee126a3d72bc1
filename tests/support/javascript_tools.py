"""Node, the npm packages of the JavaScript examples, and a shipped folder; tests are skipped where they lack."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from edgetune.config import ShipConfig
from edgetune.formats.bundle import Bundle, load_bundle
from edgetune.ship import lay_out
from support.golden import GOLDEN
from support.repository import ROOT

EXAMPLES = ROOT / "examples" / "javascript"
LEAST_NODE = 20
TIMEOUT = 120


def missing() -> str | None:
    """What the JavaScript examples lack on this machine."""
    node = shutil.which("node")
    if node is None:
        return f"no node; install Node {LEAST_NODE} or newer"
    version = subprocess.run([node, "--version"], capture_output=True, text=True, check=True).stdout
    if int(re.findall(r"\d+", version)[0]) < LEAST_NODE:
        return f"node is {version.strip()}; install Node {LEAST_NODE} or newer"
    if not (EXAMPLES / "node_modules").is_dir():
        return "no npm packages; run `make web-tools`"
    return None


needs_node = pytest.mark.skipif(missing() is not None, reason=str(missing()))


def node(script: Path, *arguments: str | Path, stdin: str = "") -> subprocess.CompletedProcess[str]:
    """Run a script to its end."""
    command = ["node", str(script), *map(str, arguments)]
    return subprocess.run(command, input=stdin, capture_output=True, text=True, timeout=TIMEOUT, check=False)


def ask_node(script: str, *arguments: str | Path, request: Any = None) -> Any:
    """What a script of tests/javascript answers: JSON in, JSON out."""
    done = node(ROOT / "tests" / "javascript" / script, *arguments, stdin=json.dumps(request))
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def lay_out_golden(folder: Path) -> Path:
    """The golden bundle as a shipped folder for the web that starts from the golden adapter."""
    config = ShipConfig(adapter=GOLDEN / "initial_adapter")
    return lay_out_for_web(load_bundle(GOLDEN / "bundle"), folder, config)


def lay_out_for_web(bundle: Bundle, folder: Path, config: ShipConfig) -> Path:
    return lay_out(bundle, "web", folder, config).path


def train_in_python(
    weight_decay: float,
    folder: Path,
    bundle: Path = GOLDEN / "bundle",
    adapter: Path = GOLDEN / "initial_adapter",
) -> list[float]:
    """The losses of `edgetune train` on stock ONNX Runtime, 20 steps on the golden rows; the adapter is in `folder`."""
    options = "--runtime onnxruntime --plan whole --steps 20 --batch-size 3 --learning-rate 0.005 --schedule constant"
    command = [sys.executable, "-m", "edgetune", "train", str(bundle), "--data", str(GOLDEN / "train.jsonl")]
    command += [*options.split(), "--no-shuffle", "--weight-decay", str(weight_decay), "--output", str(folder)]
    command += ["--init-adapter", str(adapter), "--quiet"]
    subprocess.run(command, check=True, timeout=TIMEOUT)
    return [json.loads(line)["loss"] for line in (folder / "metrics.jsonl").read_text().splitlines()]
