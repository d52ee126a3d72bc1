"""What a file says cannot steer the terminal that it is shown on."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import pytest
from click.testing import CliRunner
from onnx import TensorProto, helper
from safetensors.numpy import load_file, save_file
from test_describe import make_adapter, make_bundle
from test_device import VALID

from edgetune.bundle import MANIFEST, load_manifest, seal_bundle
from edgetune.cli import main
from edgetune.cli.failures import DEBUG, report
from edgetune.cli.output import notices, printable
from edgetune.errors import VerificationError
from edgetune.manifest import BundleManifest, Graph

GOLDEN = Path(__file__).parents[1] / "artifacts" / "golden"
EVIL = "\x1b[2J\u202e[/red]"
SHOWN = "\\x1b[2J\\u202e[/red]"


def shown(*arguments: object, code: int = 0) -> str:
    """What a command writes for people, none of which steers anything."""
    done = CliRunner().invoke(main, [*map(str, arguments)], color=False)
    assert done.exit_code == code, done.output
    assert not set(done.output) & {"\x1b", "\u202e"}, done.output
    return "".join(done.output.split())


def test_directions_and_halves_are_made_visible_and_joined_emoji_stay() -> None:
    assert printable("a\u202eb\u2069c\u200fd") == "a\\u202eb\\u2069c\\u200fd"
    assert printable("\ud83d \udcff") == "\\ud83d \\udcff"
    for text in ("👩\u200d🚀", "a\u200cb", "שלום", "e\u0301", "soft\u00adhyphen"):
        assert printable(text) == text


@pytest.mark.parametrize("debug", [False, True])
def test_errors_show_what_they_name(
    debug: bool, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(DEBUG, "1" if debug else "")
    assert report(VerificationError(f"{EVIL}: was changed\nsecond"), as_json=True) == 5
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
    path.write_text(VALID.replace("My board", evil).replace("data sheet", evil).replace("static shapes only", evil))
    text = shown("devices", "show", path)
    assert f"title:{SHOWN}" in text
    assert text.count(SHOWN) == 4
    path.write_text(VALID.replace("QNNExecutionProvider", evil).replace("pip install it", evil))
    assert f"{SHOWN}:nothere" in shown("devices", "check", path)


def test_nodes_of_a_graph_are_named(tmp_path: Path) -> None:
    x, y = (helper.make_tensor_value_info(name, TensorProto.FLOAT, [1, 2]) for name in ("x", "y"))
    graph = helper.make_graph([helper.make_node("Einsum", ["x"], ["y"], name=EVIL, equation="ij->ij")], "g", [x], [y])
    onnx.save(helper.make_model(graph), tmp_path / "graph.onnx")
    assert SHOWN in shown("conformance", tmp_path / "graph.onnx", code=4)
