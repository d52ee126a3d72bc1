"""What `edgetune inspect` knows of a bundle, an adapter and a model."""

from __future__ import annotations

import hashlib
import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner
from safetensors.numpy import save_file

from edgetune.cli import main
from edgetune.describe import describe, kind_of
from edgetune.errors import IncompatibleError, UsageError, VerificationError
from edgetune.formats.bundle import list_files, seal_bundle
from edgetune.formats.manifest import BundleManifest, Graph, ModelManifest, TensorSpec
from edgetune.formats.manifest_json import read_manifest, write_manifest
from edgetune.ship import MANIFEST as SHIPPED_MANIFEST
from support.described_folders import BASE, LORA, PARAMETERS, TOKENIZER, make_adapter, make_bundle, make_model


def inspect(folder: Path, *flags: str) -> tuple[int, str, str]:
    result = CliRunner().invoke(main, ["inspect", str(folder), *flags])
    return result.exit_code, result.stdout, result.stderr


def test_a_bundle_is_verified_and_described(tmp_path: Path) -> None:
    bundle = make_bundle(tmp_path / "bundle")
    description = describe(bundle)
    assert (description.kind, description.verified) == ("bundle", True)
    assert description.size == 4 + 2 + 2 + 5000
    assert {file.path: file.sha256 for file in description.files} == {
        path.name: hashlib.sha256(path.read_bytes()).hexdigest()
        for path in bundle.iterdir()
        if path.name != "manifest.json"
    }
    assert description.base == BASE
    assert description.tokenizer == TOKENIZER
    assert description.lora is not None
    assert (description.lora.slots, description.lora.parameters) == (2, PARAMETERS)
    assert [graph.role for graph in description.graphs] == ["step"]


def test_a_changed_byte_in_a_bundle_is_named(tmp_path: Path) -> None:
    bundle = make_bundle(tmp_path / "bundle")
    (bundle / "step.onnx").write_bytes(b"stop")
    with pytest.raises(VerificationError, match=r"step\.onnx was changed"):
        describe(bundle)
    code, stdout, stderr = inspect(bundle)
    assert (code, stdout) == (5, "")
    assert "step.onnx was changed" in stderr
    code, stdout, _ = inspect(bundle, "--json")
    assert json.loads(stdout)["error"]["code"] == 5


def test_another_format_version_is_incompatible(tmp_path: Path) -> None:
    bundle = make_bundle(tmp_path / "bundle")
    manifest = json.loads((bundle / "manifest.json").read_text())
    (bundle / "manifest.json").write_text(json.dumps({**manifest, "format_version": 99}))
    with pytest.raises(IncompatibleError, match="99"):
        describe(bundle)
    assert inspect(bundle)[0] == 4


def test_an_adapter_of_edgetune_is_verified(tmp_path: Path) -> None:
    adapter = make_adapter(tmp_path / "adapter")
    description = describe(adapter)
    assert (description.kind, description.verified, description.base) == ("adapter", True, BASE)
    assert description.lora is not None
    assert (description.lora.slots, description.lora.parameters) == (2, PARAMETERS)
    weights = adapter / "adapter_model.safetensors"
    data = bytearray(weights.read_bytes())
    data[-1] ^= 1
    weights.write_bytes(data)
    assert inspect(adapter)[0] == 5


def test_an_adapter_of_peft_tells_what_it_can(tmp_path: Path) -> None:
    adapter = make_adapter(tmp_path / "adapter")
    with_contract = describe(adapter)
    (adapter / "edgetune.json").unlink()
    description = describe(adapter)
    assert (description.kind, description.verified) == ("adapter", False)
    assert description.lora == with_contract.lora
    assert description.base == replace(BASE, sha256="", weights="")
    assert {file.path for file in description.files} == {"adapter_config.json", "adapter_model.safetensors"}


def test_pickle_and_broken_adapters_are_refused(tmp_path: Path) -> None:
    adapter = make_adapter(tmp_path / "adapter")
    (adapter / "edgetune.json").unlink()
    weights = adapter / "adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1])
    with pytest.raises(VerificationError, match=r"is cut off: it has [\d,]+ of [\d,]+ bytes; copy it again from"):
        describe(adapter)
    weights.unlink()
    (adapter / "adapter_model.bin").write_bytes(b"pickle")
    with pytest.raises(VerificationError, match=r"adapter_model\.bin is pickle, which can run code"):
        describe(adapter)
    save_file({"x": np.zeros(1, np.float32)}, weights)
    (adapter / "adapter_config.json").write_text('{"peft_type": "IA3"}')
    with pytest.raises(VerificationError, match="only LoRA adapters"):
        describe(adapter)
    (adapter / "adapter_config.json").write_text("[1]")
    with pytest.raises(VerificationError, match="expected a JSON object, found list"):
        describe(adapter)


@pytest.mark.parametrize(
    ("config", "reason"),
    [
        ('{"r": 1%s}' % ("0" * 5000), "not valid JSON"),
        ('{"r": 4, "lora_alpha": 1%s}' % ("0" * 400), "r and lora_alpha are 4 and 1000"),
        ('{"r": 4, "lora_alpha": NaN}', "r and lora_alpha are 4 and nan"),
        ('{"r": 4, "lora_alpha": 8, "target_modules": 5}', "target_modules are 5, expected names"),
        ('{"r": 4, "lora_alpha": 8, "target_modules": [5]}', r"target_modules are \[5\], expected names"),
    ],
    ids=["digits", "large", "not a number", "a number", "a list of numbers"],
)
def test_a_configuration_of_peft_that_nobody_wrote_is_refused(tmp_path: Path, config: str, reason: str) -> None:
    adapter = make_adapter(tmp_path / "adapter")
    (adapter / "edgetune.json").unlink()
    (adapter / "adapter_config.json").write_text(config)
    with pytest.raises(VerificationError, match=reason):
        describe(adapter)
    assert inspect(adapter)[0] == 5


@pytest.mark.parametrize("targets", [None, "o_proj", ["o_proj"]])
def test_names_of_target_modules_may_be_a_pattern_or_none(tmp_path: Path, targets: str | list[str] | None) -> None:
    adapter = make_adapter(tmp_path / "adapter")
    (adapter / "edgetune.json").unlink()
    config = {"r": 4, "lora_alpha": 8, "target_modules": targets}
    (adapter / "adapter_config.json").write_text(json.dumps(config))
    lora = describe(adapter).lora
    assert lora is not None
    assert lora.target_modules == ([] if targets is None else ["o_proj"])


def test_a_model_is_described_from_its_graph(tmp_path: Path) -> None:
    description = describe(make_model(tmp_path / "model"))
    assert (description.kind, description.verified, description.max_length) == ("model", False, 128)
    assert description.adapters == ["adapters/mine.onnx_adapter"]
    (graph,) = description.graphs
    assert graph.inputs == [TensorSpec("input_ids", "int64", ["batch", "sequence"])]
    assert graph.outputs == [TensorSpec("logits", "float", ["batch", "sequence", 512])]


def test_an_exported_model_is_verified(tmp_path: Path) -> None:
    model = make_model(tmp_path / "model")
    for name in ("model.onnx.data", "tokenizer.json"):
        (model / name).write_bytes(name.encode())
    manifest = ModelManifest(
        format="edgetune-model",
        format_version=1,
        base=BASE,
        tokenizer=TOKENIZER,
        lora=LORA,
        weights="int4",
        adapter="adapters/mine.onnx_adapter",
        losses={"base": 2.5, "base + adapter": 0.125},
        provenance={"edgetune": "0.1.0"},
        files=list_files(model, without="edgetune.json"),
    )
    (model / "edgetune.json").write_bytes(write_manifest(manifest))
    description = describe(model)
    assert (description.kind, description.verified, description.weights) == ("model", True, "int4")
    assert (description.base, description.losses) == (BASE, manifest.losses)
    assert description.graphs[0].outputs[0].name == "logits"
    assert "base 2.5000, base + adapter 0.1250" in inspect(model)[1]
    (model / "adapters" / "mine.onnx_adapter").write_bytes(b"another")
    assert inspect(model)[0] == 5


@pytest.mark.parametrize("name", ["../secret.onnx", "/etc/passwd", "missing.onnx"])
def test_a_model_whose_graph_is_elsewhere_is_refused(tmp_path: Path, name: str) -> None:
    model = make_model(tmp_path / "model")
    (tmp_path / "secret.onnx").write_bytes((model / "model.onnx").read_bytes())
    (model / "genai_config.json").write_text(json.dumps({"model": {"decoder": {"filename": name}}}))
    with pytest.raises(VerificationError, match="expected a file in"):
        describe(model)


@pytest.mark.parametrize("text", ["{", '{"model": 3}', '{"model": {"decoder": {}}}', '{"a": 1%s}' % ("0" * 5000)])
def test_a_model_without_a_usable_configuration_is_refused(tmp_path: Path, text: str) -> None:
    model = make_model(tmp_path / "model")
    (model / "genai_config.json").write_text(text)
    assert inspect(model)[0] == 5


def test_kinds_are_told_by_their_files(tmp_path: Path) -> None:
    (tmp_path / "checkpoint").mkdir()
    (tmp_path / "checkpoint" / "config.json").write_text("{}")
    (tmp_path / "empty").mkdir()
    assert kind_of(make_bundle(tmp_path / "bundle")) == "bundle"
    assert kind_of(make_adapter(tmp_path / "adapter")) == "adapter"
    assert kind_of(make_model(tmp_path / "model")) == "model"
    assert kind_of(tmp_path / "checkpoint") == "checkpoint"
    assert kind_of(tmp_path / "empty") == "folder"
    assert kind_of(tmp_path / "model" / "model.onnx") == "file"
    assert kind_of(tmp_path / "nix") == "nothing"
    (tmp_path / "shipped").mkdir()
    (tmp_path / "shipped" / SHIPPED_MANIFEST).write_text("{}")
    assert kind_of(tmp_path / "shipped") == "shipped"


def test_a_bundle_that_has_lost_its_manifest_is_no_model(tmp_path: Path) -> None:
    folder = make_bundle(tmp_path / "bundle")
    (folder / "loss.onnx").write_bytes(b"")
    (folder / "manifest.json").unlink()
    with pytest.raises(UsageError, match=r"is a bundle that has lost its manifest\.json; .*; copy it again"):
        describe(folder)


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("checkpoint", "is a Hugging Face checkpoint; expected a bundle, an adapter or a model; `edgetune prepare`"),
        ("nix", "is not there"),
        ("file", "is a file, not a folder"),
        ("empty", "is a folder without anything that edgetune knows"),
    ],
)
def test_other_places_are_named(tmp_path: Path, name: str, reason: str) -> None:
    (tmp_path / "checkpoint").mkdir()
    (tmp_path / "checkpoint" / "config.json").write_text("{}")
    (tmp_path / "empty").mkdir()
    (tmp_path / "file").write_text("")
    with pytest.raises(UsageError) as caught:
        describe(tmp_path / name)
    assert reason in str(caught.value)
    assert inspect(tmp_path / name)[0] == 2


def test_tables_for_people_hold_the_facts(tmp_path: Path) -> None:
    code, stdout, _ = inspect(make_bundle(tmp_path / "bundle"))
    assert code == 0
    words = ["bundle (verified)", "tiny-phi3", BASE.sha256, "2 slots, rank 4, alpha 8", f"{PARAMETERS:,} parameters"]
    words += ["input_ids int64 [b, s]", "MatMul 3", TOKENIZER.sha256, "edgetune 0.1.0", "64 tokens", "5.0 kB"]
    for word in [*words, hashlib.sha256(b"step").hexdigest()]:
        assert word in stdout
    assert "no manifest to verify against" in inspect(make_model(tmp_path / "model"))[1]
    assert "adapter (verified)" in inspect(make_adapter(tmp_path / "adapter"))[1]


def test_the_table_of_a_graph_folds_layers_and_lora_parameters(tmp_path: Path) -> None:
    folder = tmp_path / "bundle"
    make_bundle(folder)
    manifest = read_manifest((folder / "manifest.json").read_bytes(), BundleManifest, "manifest")
    inputs = [TensorSpec("input_ids", "int64", ["b"])]
    inputs += [TensorSpec(f"past.{layer}.key", "float", [2, "t"]) for layer in range(3)]
    inputs += [TensorSpec(name, "float", list(shape)) for name, shape in LORA.shapes().items()]
    graph = Graph("step", "step.onnx", inputs, [])
    seal_bundle(folder, replace(manifest, graphs=[graph]))
    stdout = inspect(folder)[1]
    assert "past.N.key float [2, t] for each of 3" in stdout
    assert "4 for LoRA parameters" in stdout
    assert "lora_A" not in stdout
    assert len(json.loads(inspect(folder, "--json")[1])["graphs"][0]["inputs"]) == 8


def test_json_holds_everything(tmp_path: Path) -> None:
    code, stdout, _ = inspect(make_bundle(tmp_path / "bundle"), "--json")
    assert code == 0
    value = json.loads(stdout)
    assert (value["kind"], value["verified"], value["size"]) == ("bundle", True, 5008)
    assert value["base"] == {"name": "tiny-phi3", "sha256": "ab" * 32, "weights": "int4"}
    assert value["lora"]["slots"] == 2
    assert value["graphs"][0]["inputs"] == [{"name": "input_ids", "dtype": "int64", "shape": ["b", "s"]}]
    assert {file["path"] for file in value["files"]} == {
        "step.onnx",
        "genai_config.json",
        "config.json",
        "model.onnx.data",
    }
