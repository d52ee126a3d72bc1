"""The golden folder is whole, is what its script makes today, and is what `artifacts/FORMAT.md` says."""

from __future__ import annotations

import hashlib
import importlib.util
import json
import re
import shutil
from dataclasses import fields, is_dataclass, replace
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import onnx
import pytest
from safetensors.numpy import load_file

from edgetune.formats import manifest
from edgetune.formats.bundle import Bundle, load_bundle
from edgetune.formats.manifest import BundleManifest
from edgetune.model import architecture, lora, rope
from edgetune.side_environment import ensure_side_environment, run_worker
from support.bundle_copy import copy_of_bundle
from support.repository import ROOT

ARTIFACTS = ROOT / "artifacts"
GOLDEN = ARTIFACTS / "golden"
LIMIT_BYTES = 2_000_000
ANEW = "run `python artifacts/make_golden.py` and look at what changes"
FORMAT = (ARTIFACTS / "FORMAT.md").read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def script() -> ModuleType:
    spec = importlib.util.spec_from_file_location("make_golden", ARTIFACTS / "make_golden.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def made(script: ModuleType, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What the script makes today of the committed base and rows."""
    golden = tmp_path_factory.mktemp("made") / "golden"
    ours = shutil.ignore_patterns(script.BUNDLE, script.ADAPTER, script.EXPECTED)
    shutil.copytree(GOLDEN, golden, ignore=ours)
    script.make_golden(golden, new_base=False)
    return golden


@pytest.fixture(scope="module")
def bundle() -> Bundle:
    return load_bundle(GOLDEN / "bundle")


@pytest.fixture(scope="module")
def expected() -> dict[str, Any]:
    values: dict[str, Any] = json.loads((GOLDEN / "expected.json").read_text(encoding="utf-8"))
    return values


def files_of(folder: Path) -> list[Path]:
    """All files but what runtimes cache beside a bundle that was trained."""
    return [path for path in folder.rglob("*") if path.is_file() and ".cache" not in path.parts]


def test_the_bundle_is_whole_and_small(bundle: Bundle) -> None:
    paths = files_of(bundle.path)
    listed = {entry.path for entry in bundle.manifest.files}
    assert {path.relative_to(bundle.path).as_posix() for path in paths} == listed | {"manifest.json"}
    assert sum(path.stat().st_size for path in paths) < LIMIT_BYTES
    assert bundle.manifest.base.weights == "int4"


def test_the_script_makes_the_same_manifest(bundle: Bundle, made: Path) -> None:
    fresh = load_bundle(made / "bundle").manifest
    ours = replace(bundle.manifest, manifest_sha256="", provenance={})
    for field in fields(BundleManifest):
        if field.name not in ("manifest_sha256", "provenance"):
            assert getattr(fresh, field.name) == getattr(ours, field.name), f"{field.name} differs: {ANEW}"
    assert fresh.provenance.keys() == bundle.manifest.provenance.keys()


def test_the_script_makes_the_same_bytes(made: Path) -> None:
    """All but the manifest, which names tool versions, and what PyTorch computes, which is compared below."""
    names = {path.relative_to(GOLDEN) for path in files_of(GOLDEN)}
    assert {path.relative_to(made) for path in files_of(made)} == names
    others = ("bundle/manifest.json", "initial_adapter/adapter_config.json", "expected.json")
    compared = names - set(map(Path, others))
    different = [str(name) for name in sorted(compared) if (made / name).read_bytes() != (GOLDEN / name).read_bytes()]
    assert different == [], ANEW


def test_pytorch_still_expects_the_same(made: Path, expected: dict[str, Any]) -> None:
    fresh = json.loads((made / "expected.json").read_text(encoding="utf-8"))
    for name in ("options", "rows", "answers"):
        assert fresh[name] == expected[name], f"{name} differs: {ANEW}"
    for name in ("losses", "grad_norms"):
        np.testing.assert_allclose(fresh[name], expected[name], rtol=1e-4)
    assert fresh["validation_loss"] == pytest.approx(expected["validation_loss"], rel=1e-4)
    config = json.loads((made / "initial_adapter" / "adapter_config.json").read_text())
    ours = json.loads((GOLDEN / "initial_adapter" / "adapter_config.json").read_text())
    assert {**config, "peft_version": ""} == {**ours, "peft_version": ""}


def test_the_base_is_what_the_script_would_train(script: ModuleType, tmp_path: Path) -> None:
    """Its tokenizer byte for byte, its weights but for the training."""
    tokenizer = script.train_tokenizer()
    tokenizer.save_pretrained(tmp_path)
    base = GOLDEN / script.BASE
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        assert (tmp_path / name).read_bytes() == (base / name).read_bytes(), name
    model = script.new_model(tokenizer)
    config = json.loads((base / "config.json").read_text())
    for key in ("hidden_size", "vocab_size", "num_hidden_layers", "max_position_embeddings", "pad_token_id"):
        assert config[key] == getattr(model.config, key)


def test_the_expected_losses_fall(expected: dict[str, Any]) -> None:
    assert len(expected["losses"]) == len(expected["grad_norms"]) == expected["options"]["steps"] == 20
    assert expected["validation_loss"]["last"] < 0.6 * expected["validation_loss"]["base"]
    assert [answer["text"] for answer in expected["answers"]] == [
        "The lamp in the kitchen is now on.",
        "The fan in the cellar is now off.",
        "Yes, the radio in the attic is on.",
    ]


def test_every_key_of_a_manifest_is_described() -> None:
    known = [kind for module in (manifest, architecture, lora, rope) for kind in vars(module).values()]
    classes = {kind for kind in known if isinstance(kind, type) and is_dataclass(kind)}
    names = {field.name for kind in classes for field in fields(kind)}
    assert len(names) > 40
    # `lora.rank` describes `rank`.
    described = {word.rpartition(".")[2] for word in re.findall(r"`([\w.]+)`", FORMAT)}
    assert names - described == set()


def test_every_file_and_role_is_described(bundle: Bundle) -> None:
    graphs = {graph.file for graph in bundle.manifest.graphs if "/" in graph.file}
    paths = [entry.path for entry in bundle.manifest.files if entry.path not in graphs]
    for name in paths + [graph.role for graph in bundle.manifest.graphs]:
        assert f"`{name}`" in FORMAT
    assert [graph.role for graph in bundle.manifest.graphs if f"{graph.role}.onnx" != graph.file] == []


def test_the_seal_is_the_hash_of_the_file_without_it() -> None:
    data = (GOLDEN / "bundle" / "manifest.json").read_bytes()
    start = data.rindex(b'"manifest_sha256": "') + len(b'"manifest_sha256": "')
    seal, rest = data[start : start + 64], data[start + 64 :]
    assert rest == b'"\n}\n'
    assert hashlib.sha256(data[:start] + rest).hexdigest() == seal.decode()
    assert (json.dumps(json.loads(data), indent=1, ensure_ascii=False) + "\n").encode() == data


def test_the_base_is_known_by_the_hash_that_is_described(bundle: Bundle, script: ModuleType) -> None:
    weights = GOLDEN / script.BASE / "model.safetensors"
    line = f"model.safetensors {hashlib.sha256(weights.read_bytes()).hexdigest()}\n"
    assert hashlib.sha256(line.encode()).hexdigest() == bundle.manifest.base.sha256


def test_the_graphs_are_in_the_form_that_is_described(bundle: Bundle) -> None:
    parameters = list(bundle.manifest.lora.shapes())
    rows = ["input_ids", "labels", "attn_bias", "rope_cos", "rope_sin"]
    step, loss, adamw = (bundle.manifest.graph(role) for role in ("step", "loss", "adamw"))
    assert [value.name for value in step.inputs] == [*rows, "loss_scale", *parameters]
    assert [value.name for value in step.outputs] == ["loss", *(f"{name}.grad" for name in parameters)]
    assert [value.name for value in loss.inputs] == [*rows, *parameters]
    assert [value.name for value in loss.outputs] == ["loss", "predictions"]
    settings = ["learning_rate", "weight_decay", "max_grad_norm", "step"]
    state = [name + suffix for name in parameters for suffix in ("", ".grad", ".exp_avg", ".exp_avg_sq")]
    assert [value.name for value in adamw.inputs] == settings + state
    following = [f"{name}{suffix}.next" for name in parameters for suffix in ("", ".exp_avg", ".exp_avg_sq")]
    assert [value.name for value in adamw.outputs] == ["grad_norm", *following]
    training, evaluation = (bundle.manifest.graph(role) for role in ("training_model", "eval_model"))
    assert [value.name for value in training.inputs][:6] == [*rows, "loss_scale"]
    assert [value.name for value in training.outputs][:3] == ["objective", "loss", "grad_norm"]
    assert [value.name for value in evaluation.inputs][:6] == [*rows, "loss_scale"]
    assert [value.name for value in evaluation.outputs] == ["objective", "loss"]
    for graph in bundle.manifest.graphs:
        model = onnx.load(bundle.path / graph.file, load_external_data=False)
        assert (model.ir_version, {entry.domain: entry.version for entry in model.opset_import}[""]) == (10, 21)
        if graph.role in ("step", "loss", "adamw"):
            assert {node.domain for node in model.graph.node} <= {"", "ai.onnx"}
            assert [value.name for value in graph.outputs if not value.shape] == []


def test_the_training_graphs_read_the_very_bytes_of_the_model(bundle: Bundle) -> None:
    def ranges(role: str) -> dict[str, tuple[str, str, str]]:
        graph = onnx.load(bundle.file(role), load_external_data=False).graph
        entries = {t.name: {e.key: e.value for e in t.external_data} for t in graph.initializer if t.external_data}
        return {name: (e["location"], e["offset"], e["length"]) for name, e in entries.items()}

    stored = ranges("model")
    for role in ("step", "loss", "training_model", "eval_model"):
        read = ranges(role)
        assert read == {name: place for name, place in stored.items() if name not in ("cos_cache", "sin_cache")}
        model = onnx.load(bundle.file(role), load_external_data=False)
        assert sum(len(t.raw_data) for t in model.graph.initializer if not t.external_data) < 2_000
    assert ranges("adamw") == ranges("optimizer_model") == {}


def test_int4_blocks_are_laid_out_as_described(bundle: Bundle, script: ModuleType) -> None:
    """Decoded by the description alone, a layer is the checkpoint's, rounded."""
    from safetensors.torch import load_file as load_torch

    checkpoint = load_torch(GOLDEN / script.BASE / "model.safetensors")
    weight = checkpoint["model.layers.1.mlp.down_proj.weight"].float().numpy()
    graph = onnx.load(bundle.file("model"), load_external_data=False).graph
    places = {t.name: {e.key: e.value for e in t.external_data} for t in graph.initializer}
    data = (bundle.path / "model.onnx.data").read_bytes()

    def read(name: str) -> bytes:
        place = places[f"model.layers.1.mlp.down_proj.MatMul.{name}"]
        return data[int(place["offset"]) :][: int(place["length"])]

    octets = np.frombuffer(read("weight_Q4"), np.uint8)
    scales = np.frombuffer(read("weight_scales"), np.float32).reshape(64, 128 // 32)
    values = np.stack([octets % 16, octets // 16], axis=-1).reshape(64, 128).astype(np.float32)
    decoded = (values - 8) * np.repeat(scales, 32, axis=1)
    # What lies beyond the points of a block is clipped: up to 8.5 steps where 7 are the most.
    off = np.abs(decoded - weight) / np.repeat(np.abs(scales), 32, axis=1)
    assert off.max() <= 1.501
    assert (off <= 0.501).mean() > 0.97
    assert np.corrcoef(decoded.ravel(), weight.ravel())[0, 1] > 0.98


def blocks() -> list[str]:
    return re.findall(r"^```python\n(.*?)^```", FORMAT, re.DOTALL | re.MULTILINE)


def golden_batches(expected: dict[str, Any]) -> list[list[tuple[list[int], list[int]]]]:
    rows = [(row["input_ids"], row["labels"]) for row in expected["rows"] if row["file"] == "train.jsonl"]
    size = expected["options"]["batch_size"]
    groups = [rows[start : start + size] for start in range(0, len(rows), size)]
    return [groups[step % len(groups)] for step in range(20)]


def initial_parameters() -> dict[str, Any]:
    tensors = load_file(GOLDEN / "initial_adapter" / "adapter_model.safetensors")
    return {name.removeprefix("base_model.model."): value for name, value in tensors.items()}


@pytest.fixture(scope="module")
def described_loop(expected: dict[str, Any]) -> dict[str, Any]:
    """Names that the document's first program leaves behind."""
    names: dict[str, Any] = {
        "bundle": str(GOLDEN / "bundle"),
        "parameters": initial_parameters(),
        "batches": golden_batches(expected),
    }
    exec(compile(blocks()[0], "FORMAT.md", "exec"), names)
    return names


def test_the_described_loop_gives_pytorchs_losses(described_loop: dict[str, Any], expected: dict[str, Any]) -> None:
    np.testing.assert_allclose(described_loop["losses"], expected["losses"], rtol=1e-4)


def test_the_described_artifacts_give_pytorchs_losses(
    described_loop: dict[str, Any], expected: dict[str, Any], tmp_path: Path
) -> None:
    """In the side environment, with the weight decay set in a copy as the document says."""
    folder = copy_of_bundle(GOLDEN / "bundle", tmp_path / "bundle")
    optimizer = onnx.load(folder / "optimizer_model.onnx")
    attributes = {a.name: a for node in optimizer.graph.node for a in node.attribute}
    assert (attributes["weight_decay"].f, attributes["max_norm"].f) == (0, 1)
    attributes["weight_decay"].f = expected["options"]["weight_decay"]
    onnx.save(optimizer, folder / "optimizer_model.onnx")
    rows = enumerate(described_loop["make_batch"](rows) for rows in golden_batches(expected))
    np.savez(tmp_path / "batches.npz", **{f"{n}/{name}": value for n, batch in rows for name, value in batch.items()})
    np.savez(tmp_path / "parameters.npz", **initial_parameters())
    (tmp_path / "program.py").write_text(
        f"""
import json, sys
import numpy as np
bundle, parameters, arrays = sys.argv[1], dict(np.load(sys.argv[2])), np.load(sys.argv[3])
names = ("input_ids", "labels", "attn_bias", "rope_cos", "rope_sin")
batches = [{{name: arrays[f"{{number}}/{{name}}"] for name in names}} for number in range(20)]
{blocks()[1]}
print(json.dumps([losses, sorted(adapter)]))
""",
        encoding="utf-8",
    )
    ensure_side_environment(print)
    inputs = [str(folder), str(tmp_path / "parameters.npz"), str(tmp_path / "batches.npz")]
    losses, names = json.loads(run_worker(tmp_path / "program.py", inputs).splitlines()[-1])
    assert names == sorted(initial_parameters())
    np.testing.assert_allclose(losses, expected["losses"], rtol=1e-4)


def test_there_are_two_programs_to_run() -> None:
    assert len(blocks()) == 2
