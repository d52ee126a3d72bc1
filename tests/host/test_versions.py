"""Versions of tools are known before any work is done, whichever distribution brings ONNX Runtime."""

from __future__ import annotations

from dataclasses import replace
from importlib import metadata
from pathlib import Path

import onnxruntime
import pytest

from edgetune.config import ExportConfig, SplitConfig
from edgetune.errors import MissingDependencyError
from edgetune.exporting import export
from edgetune.host.versions import version_of
from edgetune.preparation import prepare
from edgetune.split import split
from support import prepared_bundles
from support.prepared_bundles import CONFIG, Prepared, prepare_tiny
from support.tiny_phi3 import bundle, checkpoint, save_adapter


def lacking(package: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let no distribution of this name be installed."""
    installed = metadata.distribution

    def distribution(name: str) -> metadata.Distribution:
        if name == package:
            raise metadata.PackageNotFoundError(name)
        return installed(name)

    monkeypatch.setattr(metadata, "distribution", distribution)


def test_versions_are_those_of_the_distributions(monkeypatch: pytest.MonkeyPatch) -> None:
    assert version_of("numpy") == metadata.version("numpy")
    lacking("numpy", monkeypatch)
    with pytest.raises(MissingDependencyError, match=r'numpy is not installed.*"edgetune\[host\]"'):
        version_of("numpy")


@pytest.fixture
def foreign_runtime(monkeypatch: pytest.MonkeyPatch) -> None:
    """ONNX Runtime as `onnxruntime-vitisai` brings it: the module is there, a distribution of its name is not."""
    lacking("onnxruntime", monkeypatch)


@pytest.mark.usefixtures("foreign_runtime")
def test_prepare_takes_any_distribution_of_onnx_runtime(tmp_path: Path) -> None:
    made = prepare_tiny("multi-head", tmp_path / "bundle", replace(CONFIG, base="fp32"))
    assert made.manifest.provenance["onnxruntime"] == onnxruntime.__version__


@pytest.mark.usefixtures("foreign_runtime")
def test_export_takes_any_distribution_of_onnx_runtime(tmp_path: Path) -> None:
    source = bundle("multi-head", "fp32")
    adapter = save_adapter(tmp_path / "adapter", source)
    assert export(source, adapter, tmp_path / "model", ExportConfig(merge=False)).path.is_dir()


@pytest.mark.usefixtures("foreign_runtime")
def test_split_takes_any_distribution_of_onnx_runtime(prepared: Prepared, tmp_path: Path) -> None:
    rows = tmp_path / "rows.jsonl"
    rows.write_text('{"text": "the lamp in the kitchen"}\n')
    source = prepared("multi-head", "fp32")
    made = split(source.path, rows, tmp_path / "split", SplitConfig(length=32))
    assert made.manifest.provenance["trunk"].startswith(f"onnxruntime {onnxruntime.__version__} ")


def test_a_missing_package_ends_prepare_before_anything_is_built(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lacking("peft", monkeypatch)
    with pytest.raises(MissingDependencyError, match="peft"):
        prepare(str(checkpoint("multi-head")), tmp_path / "bundle", prepared_bundles.CONFIG, say=pytest.fail)
    assert list(tmp_path.iterdir()) == []


def test_a_missing_package_ends_export_before_anything_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = bundle("multi-head", "fp32")
    adapter = save_adapter(tmp_path / "adapter", source)
    lacking("onnx", monkeypatch)
    with pytest.raises(MissingDependencyError, match="onnx is not installed"):
        export(source, adapter, tmp_path / "model", ExportConfig(merge=False), say=pytest.fail)
    assert [path.name for path in tmp_path.iterdir()] == ["adapter"]
