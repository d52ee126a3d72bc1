"""The C++ sample, compiled against ONNX Runtime's C++ API, trains a shipped folder as PyTorch trains its model."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file

from edgetune.config import ShipConfig, TrainConfig
from edgetune.formats.bundle import load_bundle
from edgetune.preview import preview
from edgetune.ship import lay_out
from edgetune.ship.platforms import PLATFORMS
from edgetune.training import train
from support.debian_packages import NoPackagesError, download, unpack
from support.golden import ADAPTER, BUNDLE, GOLDEN, TRAIN
from support.repository import ROOT

SAMPLE = ROOT / "examples" / "native" / "train.cpp"
EXPECTED = json.loads((GOLDEN / "expected.json").read_text(encoding="utf-8"))
OPTIONS = EXPECTED["options"]
HEADERS = ["libonnxruntime-dev", "nlohmann-json3-dev"]
HEADERS_FROM = "trixie"
"""Debian 13: the first release with ONNX Runtime's headers. They are of 1.21; a newer library keeps that interface."""
CLOSE = 1e-4


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The library of the installed onnxruntime wheel, under the names that a linker and a loader look for."""
    folder = tmp_path_factory.mktemp("lib")
    spec = find_spec("onnxruntime")
    assert spec is not None and spec.origin is not None
    found = sorted((Path(spec.origin).parent / "capi").glob("libonnxruntime.so.*"))
    if not found:
        pytest.skip("this onnxruntime wheel has no libonnxruntime.so")
    for name in ("libonnxruntime.so", "libonnxruntime.so.1"):
        (folder / name).symlink_to(found[0])
    return folder


@pytest.fixture(scope="module")
def program(tmp_path_factory: pytest.TempPathFactory, library: Path) -> Path:
    """The compiled sample."""
    compiler = shutil.which("c++")
    if compiler is None:
        pytest.skip("no C++ sample here: there is no C++ compiler")
    folder = tmp_path_factory.mktemp("cpp")
    try:
        packages = download(folder / "apt", HEADERS, suite=HEADERS_FROM, needed=False)
    except NoPackagesError as error:
        pytest.skip(f"no C++ sample here: {error}")
    for package in packages:
        unpack(package, folder / "headers")
    include = folder / "headers" / "usr" / "include"
    command = [compiler, "-std=c++20", "-O1", "-Wall", "-Wextra", "-Werror", f"-I{include}/onnxruntime", f"-I{include}"]
    command += [
        str(ROOT / "examples" / "native" / "train.cpp"),
        f"-L{library}",
        "-lonnxruntime",
        f"-Wl,-rpath,{library}",
    ]
    done = subprocess.run([*command, "-o", str(folder / "train")], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return folder / "train"


def rows_of(file: Path, path: Path) -> Path:
    """What `edgetune preview --json` prints of some rows."""
    rows = preview(BUNDLE, file)
    path.write_text("".join(json.dumps({"input_ids": row.input_ids, "labels": row.labels}) + "\n" for row in rows))
    return path


def test_the_sample_trains_as_pytorch_and_edgetune_do(program: Path, tmp_path: Path) -> None:
    config = ShipConfig(adapter=ADAPTER)
    small = replace(PLATFORMS["linux-arm64"], shard=20_000)
    shipped = lay_out(load_bundle(BUNDLE), "linux-arm64", tmp_path / "shipped", config, say=print, platform=small)
    assert len(shipped.manifest.weights) > 3
    rows = rows_of(TRAIN, tmp_path / "rows.jsonl")
    written = tmp_path / "adapter_model.safetensors"
    numbers = [OPTIONS[key] for key in ("steps", "batch_size", "learning_rate", "weight_decay")]
    command = [str(program), str(tmp_path / "shipped"), str(rows), str(written), *map(str, numbers)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    found = re.findall(r"step \d+ loss (\S+) gradient norm (\S+)", done.stdout)
    losses, norms = ([float(pair[place]) for pair in found] for place in (0, 1))
    np.testing.assert_allclose(losses, EXPECTED["losses"], rtol=0, atol=CLOSE)
    np.testing.assert_allclose(norms, EXPECTED["grad_norms"], rtol=10 * CLOSE)
    options = TrainConfig(**OPTIONS, runtime="onnxruntime", plan="whole", init_adapter=ADAPTER)
    train(BUNDLE, TRAIN, tmp_path / "python", options)
    ours, theirs = load_file(tmp_path / "python" / "adapter_model.safetensors"), load_file(written)
    assert ours.keys() == theirs.keys()
    for name, value in ours.items():
        np.testing.assert_allclose(theirs[name], value, rtol=0, atol=CLOSE, err_msg=name)
    print(f"furthest from PyTorch in {len(losses)} steps: {np.abs(np.subtract(losses, EXPECTED['losses'])).max():.1e}")


def test_what_is_wrong_ends_the_sample_with_a_reason(program: Path, tmp_path: Path) -> None:
    lay_out(load_bundle(BUNDLE), "ios", tmp_path / "shipped")
    rows = rows_of(TRAIN, tmp_path / "rows.jsonl")
    (tmp_path / "empty").touch()
    for name, file in (("missing", rows), ("shipped", tmp_path / "empty")):
        command = [str(program), str(tmp_path / name), str(file), str(tmp_path / "out"), "1", "2", "1e-3", "0"]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        assert (done.returncode, done.stdout) == (1, "")
        assert done.stderr.startswith("error: ")
    assert not (tmp_path / "out").exists()
