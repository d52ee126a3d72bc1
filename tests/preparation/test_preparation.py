"""`prepare` from end to end: what its bundles compute and learn, against PyTorch + PEFT."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from types import ModuleType

import numpy as np
import onnxruntime as ort
import pytest
import torch
from numpy.typing import NDArray

from edgetune.config import Base, PrepareConfig
from edgetune.data.encode import load_encoder
from edgetune.data.rows import ChatRow, Message
from edgetune.errors import ResourceError, UsageError
from edgetune.formats.bundle import Bundle, load_bundle
from edgetune.formats.genai import open_model
from edgetune.model.architecture import slots_of
from edgetune.model.lora import initial_parameters
from edgetune.preparation import HOST_TOOLS, prepare
from edgetune.runtimes import onnxruntime as stock
from edgetune.runtimes.contract import OptimizerConfig, StepResult
from edgetune.runtimes.execution import WholePlan
from edgetune.runtimes.ort_training import runtime as ort_training
from support import oracle, prepared_bundles
from support.oracle import relative
from support.prepared_bundles import Prepared, each_bundle, prepare_tiny
from support.random_rows import lengths_of, rows_of
from support.tiny_phi3 import VARIANTS, checkpoint, lora
from support.tiny_step import LEARNING_RATE, OPTIMIZER, adapter_of, batch_of

Array = NDArray[np.float32]
STEPS = 20
RUNTIMES = {"onnxruntime": stock, "ort-training": ort_training}


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> None:
    torch.set_num_threads(1)  # these models are too small for two


def run(bundle: Bundle, role: str, feed: dict[str, NDArray[np.generic]]) -> dict[str, Array]:
    session = ort.InferenceSession(bundle.file(role), providers=["CPUExecutionProvider"])
    names = [output.name for output in session.get_outputs()]
    return dict(zip(names, session.run(names, feed), strict=True))


@pytest.mark.parametrize("seed", [0, 1])
@each_bundle
def test_loss_and_gradients_are_pytorchs(prepared: Prepared, variant: str, base: Base, seed: int) -> None:
    bundle = prepared(variant, base)
    parameters = adapter_of(bundle)
    rows = rows_of(seed, lengths_of(variant, seed))
    model = oracle.peft_model(checkpoint(variant), bundle, parameters)
    loss = oracle.loss(model, rows)
    loss.backward()
    batch = batch_of(bundle, rows)
    assert batch.tokens < batch.input_ids.size, "there must be padding"
    scale = 4.0
    found = run(bundle, "step", batch.tensors() | parameters | {"loss_scale": np.array([scale], np.float32)})
    np.testing.assert_allclose(found["loss"], [loss.item()], rtol=1e-4)
    trainable = oracle.trainable(model)
    assert set(trainable) == set(parameters)
    for name, parameter in trainable.items():
        assert parameter.grad is not None
        expected = parameter.grad.numpy()
        assert np.linalg.norm(expected) > 1e-6, "a zero gradient would show nothing"
        assert relative(found[f"{name}.grad"] / scale, expected) <= 1e-4, name


@each_bundle
def test_loss_graph_predicts_as_pytorch(prepared: Prepared, variant: str, base: Base) -> None:
    bundle = prepared(variant, base)
    parameters = adapter_of(bundle)
    rows = rows_of(4, lengths_of(variant, 4))
    model = oracle.peft_model(checkpoint(variant), bundle, parameters)
    found = run(bundle, "loss", batch_of(bundle, rows).tensors() | parameters)
    with torch.no_grad():
        np.testing.assert_allclose(found["loss"], [oracle.loss(model, rows).item()], rtol=1e-4)
        for number, row in enumerate(rows):
            expected = model(torch.tensor([row.input_ids])).logits[0].argmax(-1).numpy()
            np.testing.assert_array_equal(found["predictions"][number, : len(expected)], expected)


def train_with(
    runtime: ModuleType, bundle: Bundle, parameters: dict[str, Array], variant: str
) -> tuple[list[StepResult], dict[str, Array]]:
    """Every other step accumulates two batches of different size."""
    with runtime.open_session(bundle, parameters, OPTIMIZER, WholePlan()) as session:
        results = []
        for step in range(STEPS):
            rows = rows_of(step, lengths_of(variant, step))
            groups = [rows[:1], rows[1:]] if step % 2 else [rows]
            results.append(session.step([batch_of(bundle, group) for group in groups], LEARNING_RATE))
        return results, dict(session.adapter())


@each_bundle
def test_twenty_steps_follow_pytorch_on_both_runtimes(prepared: Prepared, variant: str, base: Base) -> None:
    bundle = prepared(variant, base)
    parameters = adapter_of(bundle)
    model = oracle.peft_model(checkpoint(variant), bundle, parameters)
    trainable = oracle.trainable(model)
    optimizer = torch.optim.AdamW(trainable.values(), lr=LEARNING_RATE, weight_decay=OPTIMIZER.weight_decay)
    losses, norms = [], []
    for step in range(STEPS):
        loss = oracle.loss(model, rows_of(step, lengths_of(variant, step)))
        optimizer.zero_grad()
        loss.backward()
        norms.append(float(torch.nn.utils.clip_grad_norm_(trainable.values(), OPTIMIZER.max_grad_norm)))
        optimizer.step()
        losses.append(loss.item())
    assert max(norms) > OPTIMIZER.max_grad_norm, "clipping must be seen"
    found = {}
    for name, runtime in RUNTIMES.items():
        results, adapter = train_with(runtime, bundle, parameters, variant)
        assert all(result.applied for result in results)
        np.testing.assert_allclose([result.loss for result in results], losses, rtol=1e-3, err_msg=name)
        np.testing.assert_allclose([result.grad_norm for result in results], norms, rtol=1e-3, err_msg=name)
        for parameter, value in trainable.items():
            learnt = value.detach().numpy() - parameters[parameter]
            assert relative(adapter[parameter] - parameters[parameter], learnt) <= 5e-3, f"{name}: {parameter}"
        found[name] = [result.loss for result in results]
    np.testing.assert_allclose(found["ort-training"], found["onnxruntime"], rtol=1e-4)


@each_bundle
def test_bundle_says_what_it_is(prepared: Prepared, variant: str, base: Base) -> None:
    bundle = prepared(variant, base)
    manifest = bundle.manifest
    assert manifest.base.name == variant
    assert manifest.base.weights == base
    assert manifest.lora == replace(
        lora(variant), slots=manifest.lora.slots, target_modules=manifest.lora.target_modules
    )
    assert manifest.lora.shapes().items() == lora(variant).shapes().items()
    assert manifest.max_length == 128
    roles = {graph.role for graph in manifest.graphs}
    assert {f"layers/{name}" for name in ("attention", "mlp_grad_kept", "head_step", "int8/mlp")} <= roles
    assert {role for role in roles if "/" not in role} == {
        "step", "loss", "step_half", "loss_half", "adamw", "training_model", "eval_model", "optimizer_model", "model",
    }  # fmt: skip
    paths = [path for path in bundle.path.rglob("*") if path.is_file() and ".cache" not in path.parts]
    files = {path.relative_to(bundle.path).as_posix() for path in paths}
    assert {file.path for file in manifest.files} == files - {"manifest.json"}
    assert {"checkpoint", "config.json", "genai_config.json", "tokenizer.json", "model.onnx.data"} <= files
    rounded = {"quantiser"} if base == "int4" else set()
    assert set(manifest.provenance) == {"edgetune", *HOST_TOOLS} | rounded
    # Frozen weights lie on disk once.
    data = (bundle.path / "model.onnx.data").stat().st_size
    adapters = 4 * sum(rows * columns for rows, columns in manifest.lora.shapes().values())
    assert sum(file.size for file in manifest.files) < data + adapters + 1_200_000


def test_attention_only(tmp_path: Path) -> None:
    config = PrepareConfig(rank=2, alpha=3.0, targets="attention", base="fp32", max_length=64)
    bundle = prepare_tiny("grouped-query", tmp_path / "bundle", config)
    found = bundle.manifest.lora
    assert (found.rank, found.alpha) == (2, 3.0)
    assert sorted(found.target_modules) == ["o_proj", "qkv_proj"]
    parameters = adapter_of(bundle)
    model = oracle.peft_model(checkpoint("grouped-query"), bundle, parameters)
    rows = rows_of(2, [9, 17])
    loss = oracle.loss(model, rows)
    loss.backward()
    one = {"loss_scale": np.ones(1, np.float32)}
    step = run(bundle, "step", batch_of(bundle, rows).tensors() | parameters | one)
    np.testing.assert_allclose(step.pop("loss"), [loss.item()], rtol=1e-4)
    trainable = oracle.trainable(model)
    assert set(step) == {f"{name}.grad" for name in trainable}
    for name, parameter in trainable.items():
        assert parameter.grad is not None
        assert relative(step[f"{name}.grad"], parameter.grad.numpy()) <= 1e-4, name


def test_no_row_is_longer_than_the_models_positions(tmp_path: Path) -> None:
    bundle = prepare_tiny("multi-head", tmp_path / "bundle", PrepareConfig(max_length=257))
    assert bundle.manifest.max_length == 256


def test_answers_end_where_training_ends_them(prepared: Prepared) -> None:
    """The tiny checkpoints list `</s>` only; their template closes a turn with another token."""
    bundle = prepared("grouped-query", "int4")
    encoder = load_encoder(bundle.path, bundle.manifest.tokenizer)
    turns = (Message("user", "Is it on?"), Message("assistant", "Yes."))
    last = [label for label in encoder.encode(ChatRow(1, turns)).labels if label != -100][-1]
    assert last != 2
    assert set(open_model(bundle.path).eos_token_ids) == {2, last}


@pytest.mark.parametrize(("targets", "highest"), [("all-linear", 384), ("attention", 256)])
def test_a_rank_with_which_no_bundle_opens_is_refused_before_anything_is_built(
    tmp_path: Path, targets: str, highest: int
) -> None:
    config = PrepareConfig(rank=highest + 1, targets=targets, max_length=64)
    with pytest.raises(UsageError, match=f"^rank {highest + 1} is more than the {highest} .*at most {highest}$"):
        prepare(str(checkpoint("grouped-query")), tmp_path / "bundle", config, say=pytest.fail)
    assert not any(tmp_path.iterdir())


def test_the_highest_rank_is_not_refused(tmp_path: Path) -> None:
    config = PrepareConfig(rank=256, targets="attention", base="fp32", max_length=64)
    lora = prepare_tiny("grouped-query", tmp_path / "bundle", config).manifest.lora
    assert lora.rank == lora.highest_rank == 256
    assert load_bundle(tmp_path / "bundle").manifest.lora == lora


@pytest.mark.parametrize("variant", VARIANTS)
def test_the_architecture_tells_pefts_slots(prepared: Prepared, variant: str) -> None:
    manifest = prepared(variant, "int4").manifest
    slots = slots_of(manifest.architecture, manifest.lora.target_modules)
    assert set(slots) == set(manifest.lora.slots) and len(slots) == len(manifest.lora.slots)


def test_existing_output_is_refused_before_anything_is_built(tmp_path: Path) -> None:
    output = tmp_path / "bundle"
    output.mkdir()
    (output / "precious").write_text("kept")
    with pytest.raises(UsageError, match="already exists"):
        prepare(str(checkpoint("multi-head")), output, PrepareConfig(max_length=64), say=pytest.fail)
    assert (output / "precious").read_text() == "kept"


def test_force_replaces_a_bundle_and_a_failure_leaves_it(
    prepared: Prepared, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    output = tmp_path / "bundle"
    config = replace(prepared_bundles.CONFIG, force=True)
    first = prepare_tiny("multi-head", output, config)
    same = prepared("multi-head", "int4")
    monkeypatch.setattr("edgetune.preparation.gradient.differentiate", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        prepare_tiny("multi-head", output, replace(config, rank=2))
    assert load_bundle(output).manifest == first.manifest
    assert [entry.name for entry in tmp_path.iterdir() if not entry.name.endswith(".lock")] == ["bundle"]
    # The same checkpoint and options give the same bundle, byte for byte.
    assert first.manifest.files == same.manifest.files


def test_tells_its_stages(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    heard: list[str] = []
    monkeypatch.setattr(prepared_bundles, "silent", heard.append)
    prepare_tiny("multi-head", tmp_path / "bundle", replace(prepared_bundles.CONFIG, base="fp32"))
    stages = ["Building the fp32", "Exporting", "Differentiating", "Gradient coverage", "Lowering"]
    stages.append("Exporting and differentiating the sublayers")
    stages += ["Answers end with <|end|>, where the model did not stop until now", "Hashing"]
    assert [line.startswith(stage) for line, stage in zip(heard, stages, strict=True)] == [True] * len(stages)


def test_a_worker_that_the_system_ends_is_a_matter_of_memory(prepared: Prepared) -> None:
    bundle = prepared("grouped-query", "int4")
    first = initial_parameters(bundle.manifest.lora, seed=0)
    with (
        ort_training.open_session(bundle, first, OptimizerConfig(0.0, 0.0), WholePlan()) as session,
        pytest.raises(ResourceError, match="memory"),
    ):
        session._worker.kill()
        session._worker.wait()
        session.adapter()
