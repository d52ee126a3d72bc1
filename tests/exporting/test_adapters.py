"""Several adapters in one folder: their names, their files, their losses, and what the command line takes."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from click.testing import CliRunner

from edgetune.cli import main
from edgetune.config import ExportConfig
from edgetune.errors import UsageError
from edgetune.exporting import export
from edgetune.exporting.adapters import name_of, read_adapters
from edgetune.formats.genai import open_model
from edgetune.formats.manifest import ModelManifest
from support.tiny_bundle import write_rows
from support.tiny_phi3 import bundle, parameters, save_adapter


@pytest.fixture(scope="module")
def adapters(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("adapters")
    source = bundle("grouped-query", "int4")
    save_adapter(folder / "kitchen", source)
    half = {name: value / 2 for name, value in parameters("grouped-query").items()}
    save_adapter(folder / "garden", source, values=half)
    return folder


def invoke(*arguments: str | Path) -> tuple[int, str]:
    result = CliRunner().invoke(main, [str(argument) for argument in arguments])
    return result.exit_code, result.output


def test_the_command_line_names_them_by_folder_or_as_it_is_told(adapters: Path, tmp_path: Path) -> None:
    source = bundle("grouped-query", "int4")
    with_equals = Path(shutil.copytree(adapters / "garden", tmp_path / "rate=3"))
    rows = write_rows(tmp_path / "rows.jsonl", [{"prompt": "is it on?", "completion": " yes"}])
    code, said = invoke(
        "export", source.path, "--adapter", adapters / "kitchen", "--adapter", f"beds={adapters / 'garden'}",
        "--adapter", with_equals, "--output", tmp_path / "model", "--keep-adapter", "--valid", rows,
    )  # fmt: skip
    assert code == 0, said
    manifest = open_model(tmp_path / "model").manifest
    assert isinstance(manifest, ModelManifest)
    assert list(manifest.adapters) == ["kitchen", "beds", "adapter"]
    assert manifest.adapter == "adapters/kitchen.onnx_adapter"
    assert (tmp_path / "model" / "adapters" / "beds.onnx_adapter").is_file()
    for name in manifest.adapters:
        folder = adapters / ("kitchen" if name == "kitchen" else "garden")
        alone = export(source, folder, tmp_path / name, ExportConfig(merge=False), valid=rows)
        assert manifest.losses[f"base, rows of {name}"] == pytest.approx(alone.losses["base"])
        assert manifest.losses[f"base + {name}"] == pytest.approx(alone.losses["base + adapter"])
    assert manifest.losses["base + kitchen"] != manifest.losses["base + beds"]
    assert {key for key in manifest.provenance if "adapter" in key} == {
        "adapter_sha256", "adapter_sha256 beds", "adapter_sha256 adapter",
    }  # fmt: skip


def test_one_adapter_leaves_the_manifest_as_it_was(adapters: Path, tmp_path: Path) -> None:
    export(bundle("grouped-query", "int4"), adapters / "kitchen", tmp_path / "model", ExportConfig(merge=False))
    record = json.loads((tmp_path / "model" / "edgetune.json").read_text())
    assert "adapters" not in record
    assert record["adapter"] == "adapters/kitchen.onnx_adapter"


def test_what_cannot_be_named_or_merged_is_refused(adapters: Path, tmp_path: Path) -> None:
    source = bundle("grouped-query", "int4")
    kitchen, garden = adapters / "kitchen", adapters / "garden"
    code, said = invoke(
        "export", source.path, "--adapter", kitchen, "--adapter", garden, "--output", tmp_path / "model"
    )
    assert code == 2 and "one adapter is merged into the weights, not kitchen, garden" in said
    code, said = invoke(
        "export", source.path, "--adapter", kitchen, "--adapter", f"kitchen={garden}", "--output", tmp_path / "model"
    )
    assert code == 2 and "two adapters are called kitchen" in said
    for name in ("base", "../x", ".hidden", "a b", ""):
        with pytest.raises(UsageError, match="an adapter cannot be named"):
            read_adapters(source, {name: kitchen})
    with pytest.raises(UsageError, match="differ in case alone"):
        read_adapters(source, {"Kitchen": kitchen, "kitchen": garden})
    with pytest.raises(UsageError, match="no adapter to export"):
        read_adapters(source, {})
    assert not (tmp_path / "model").exists()


@pytest.mark.parametrize(
    ("folder", "name"), [("a7", "a7"), ("Küche", "adapter"), ("base", "adapter"), ("x/..", "adapter")]
)
def test_a_folder_whose_name_is_none_for_a_file_is_called_adapter(tmp_path: Path, folder: str, name: str) -> None:
    place = tmp_path / "ü"
    place.mkdir()
    assert name_of(place / folder) == name
