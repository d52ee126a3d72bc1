"""DoRA: loss and gradients of every plan against PyTorch + PEFT, per tensor, and what steps come to."""

from __future__ import annotations

from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
import torch

from edgetune.config import Base, PrepareConfig, TrainConfig
from edgetune.errors import IncompatibleError, UsageError
from edgetune.formats.row_norms import read_row_norms
from edgetune.model.lora import MAGNITUDE, initial_parameters
from edgetune.planning.choice import choose
from edgetune.planning.memory import Sizes, Work, peak_memory
from edgetune.preparation import prepare
from edgetune.runtimes import find_runtime
from edgetune.runtimes.contract import OptimizerConfig
from edgetune.runtimes.execution import ExecutionPlan, LayeredPlan, Precision, WholePlan
from edgetune.ship import lay_out
from edgetune.split import split
from support import oracle
from support.oracle import cosine, relative
from support.prepared_bundles import Prepared
from support.random_rows import lengths_of, rows_of
from support.run_requests import request_of
from support.tiny_phi3 import checkpoint
from support.tiny_step import LEARNING_RATE, OPTIMIZER, adapter_of, batch_of

RECOMPUTE = LayeredPlan(kept_layers=0, resident=False, head_rows=16, head_tokens=100)
KEEP = LayeredPlan(kept_layers=2, resident=True, head_rows=1024)
LAYERED = {
    "keep": KEEP,
    "keep one of two": replace(KEEP, kept_layers=1),
    "stream": RECOMPUTE,
    "lean": replace(RECOMPUTE, lean=True),
}
PLANS: dict[str, ExecutionPlan] = {"whole": WholePlan(), **LAYERED}
TOLERANCE: dict[Base, float] = {"fp32": 1e-4, "int4": 2e-3}
BUNDLES: list[tuple[str, Base]] = [("grouped-query", "fp32"), ("grouped-query", "int4"), ("longrope", "fp32")]


@pytest.mark.parametrize("plan", PLANS)
@pytest.mark.parametrize(("variant", "base"), BUNDLES)
def test_loss_and_gradients_are_pefts(with_dora: Prepared, variant: str, base: Base, plan: str) -> None:
    """The norm is detached: if it were not, the gradients of A and B would be others."""
    bundle = with_dora(variant, base)
    parameters = adapter_of(bundle)
    rows = rows_of(1, lengths_of(variant, 1))
    model = oracle.peft_model(checkpoint(variant), bundle, parameters)
    loss = oracle.loss(model, rows)
    loss.backward()
    batch = batch_of(bundle, rows)
    with find_runtime("onnxruntime").open_session(bundle, parameters, OPTIMIZER, PLANS[plan]) as session:
        assert session.evaluate(batch) == pytest.approx(loss.item(), rel=1e-4)
        assert session.step([batch], LEARNING_RATE).loss == pytest.approx(loss.item(), rel=1e-4)
        found = session.gradients()  # type: ignore[attr-defined]
    expected = oracle.trainable(model)
    assert set(found) == set(expected) == set(bundle.manifest.lora.shapes())
    most = max(TOLERANCE[base], 2e-3 if plan == "lean" else 0)
    for name, parameter in expected.items():
        assert parameter.grad is not None
        assert relative(found[name], parameter.grad.numpy()) <= most, name


@pytest.mark.parametrize(("base", "plan"), [("fp32", "whole"), ("int4", "keep")])
def test_steps_are_pefts(with_dora: Prepared, base: Base, plan: str) -> None:
    """From the first adapter on, whose magnitudes are the row norms, of several passes a step."""
    bundle = with_dora("grouped-query", base)
    parameters = initial_parameters(bundle.manifest.lora, 3, read_row_norms(bundle))
    model = oracle.peft_model(checkpoint("grouped-query"), bundle, parameters)
    optimizer = torch.optim.AdamW(oracle.trainable(model).values(), lr=LEARNING_RATE, weight_decay=0.01)
    rows = [rows_of(seed, lengths_of("grouped-query", seed)) for seed in range(2)]
    batches = [batch_of(bundle, each) for each in rows]
    tokens = [batch.trained_tokens for batch in batches]
    decay = OptimizerConfig(weight_decay=0.01, max_grad_norm=1.0)
    with find_runtime("onnxruntime").open_session(bundle, parameters, decay, PLANS[plan]) as session:
        for _ in range(20):
            optimizer.zero_grad()
            loss = sum(oracle.loss(model, each) * count for each, count in zip(rows, tokens, strict=True)) / sum(tokens)
            assert isinstance(loss, torch.Tensor)
            loss.backward()
            torch.nn.utils.clip_grad_norm_(oracle.trainable(model).values(), 1.0)
            optimizer.step()
            assert session.step(batches, LEARNING_RATE).loss == pytest.approx(loss.item(), rel=1e-3)
        learnt = session.adapter()
    for name, parameter in oracle.trainable(model).items():
        assert relative(learnt[name], parameter.detach().numpy()) <= 1e-3, name
    moved = [name for name, first in parameters.items() if name.endswith(MAGNITUDE) and (learnt[name] != first).all()]
    assert len(moved) == len(bundle.manifest.lora.slots)


@pytest.mark.parametrize("plan", ["keep", "stream"])
def test_int8_products_point_where_exact_ones_do(with_dora: Prepared, plan: str) -> None:
    bundle = with_dora("grouped-query", "int4")
    parameters = adapter_of(bundle)
    batch = batch_of(bundle, rows_of(1, lengths_of("grouped-query", 1)))
    found = {}
    precisions: tuple[Precision, ...] = ("fp32", "int8")
    for precision in precisions:
        given = replace(LAYERED[plan], precision=precision)
        with find_runtime("onnxruntime").open_session(bundle, parameters, OPTIMIZER, given) as session:
            session.step([batch], LEARNING_RATE)
            found[precision] = dict(session.gradients())  # type: ignore[attr-defined]
    for name, exact in found["fp32"].items():
        assert cosine(np.asarray(found["int8"][name]), np.asarray(exact)) >= 0.99, name


@pytest.mark.skipif(find_spec("openvino") is None, reason="openvino is not installed")
@pytest.mark.parametrize("precision", ["exact", "int8"])
@pytest.mark.parametrize("plan", ["keep", "stream"])
@pytest.mark.parametrize("base", ["int4", "fp32"])
def test_openvinos_gradients_are_pefts(with_dora: Prepared, base: Base, plan: str, precision: str) -> None:
    """Of int4 in pieces, whose channels are not in turn; in bfloat16 where the processor has it."""
    runtime = find_runtime("openvino")
    abilities = runtime.abilities()
    footprint = abilities.int8 if precision == "int8" else abilities.exact
    if footprint is None:
        pytest.skip("the processor has no bfloat16")
    bundle = with_dora("grouped-query", base)
    parameters = adapter_of(bundle)
    rows = rows_of(1, lengths_of("grouped-query", 1))
    model = oracle.peft_model(checkpoint("grouped-query"), bundle, parameters)
    loss = oracle.loss(model, rows)
    loss.backward()
    chosen = replace(LAYERED[plan], precision=footprint.precision)
    with runtime.open_session(bundle, parameters, OPTIMIZER, chosen) as session:
        np.testing.assert_equal(session.adapter(), parameters)
        result = session.step([batch_of(bundle, rows)], LEARNING_RATE)
        found = session.gradients()  # type: ignore[attr-defined]
    assert result.loss == pytest.approx(loss.item(), rel=5e-3)
    for name, parameter in oracle.trainable(model).items():
        assert parameter.grad is not None
        expected = parameter.grad.numpy()
        if footprint.precision == "fp32":
            assert relative(found[name], expected) <= 1e-3, name
        else:
            assert cosine(found[name], expected) >= (0.985 if precision == "int8" else 0.996), name


@pytest.mark.parametrize(
    ("config", "name"),
    [
        (TrainConfig(runtime="ort-training"), "--runtime ort-training"),
        (TrainConfig(runtime="qnn", plan="whole"), "--runtime qnn"),
        (TrainConfig(runtime="openvino-ep", plan="whole"), "--runtime openvino-ep"),
        (TrainConfig(runtime="fpga-hls"), "--runtime fpga-hls"),
        (TrainConfig(runtime="openvino", plan="whole", device_type="NPU"), "--device-type NPU"),
        (TrainConfig(method="forward-only"), "--method forward-only"),
        (TrainConfig(trunk=True), "--trunk"),
    ],
    ids=lambda given: given if isinstance(given, str) else "",
)
def test_what_does_not_train_magnitudes_is_refused_by_name(with_dora: Prepared, config: TrainConfig, name: str) -> None:
    bundle = with_dora("grouped-query", "fp32")
    with pytest.raises(IncompatibleError, match=rf"DoRA.*{name} does not train yet; use --runtime onnxruntime"):
        choose(bundle.manifest, request_of(config, here=False), Work(32, 1024))


def test_what_is_made_of_a_bundle_for_others_is_refused(with_dora: Prepared, tmp_path: Path) -> None:
    bundle = with_dora("grouped-query", "fp32")
    with pytest.raises(IncompatibleError, match=r"DoRA.*without --dora"):
        lay_out(bundle, "android", tmp_path / "shipped")
    with pytest.raises(IncompatibleError, match=r"DoRA.*without --dora"):
        split(bundle, tmp_path / "rows.jsonl", tmp_path / "split")
    with pytest.raises(UsageError, match="npu blocks"):
        prepare("checkpoint", tmp_path / "bundle", PrepareConfig(dora=True, npu="blocks"))
    assert not list(tmp_path.iterdir())


def test_memory_of_magnitudes_is_planned(prepared: Prepared, with_dora: Prepared) -> None:
    """Each with gradient, two moments and a copy, gains and norms, A·Wᵀ of a layer, and the results that are kept."""
    plain, dora = (make("grouped-query", "fp32").manifest for make in (prepared, with_dora))
    footprint = find_runtime("onnxruntime").abilities().exact
    assert footprint is not None
    work = Work(32, 1024)
    peaks = [peak_memory(Sizes(each, KEEP), footprint, work, KEEP) for each in (plain, dora)]
    rows = sum(slot.out_features for slot in dora.lora.slots)
    hidden, layers, rank = dora.architecture.hidden_size, dora.architecture.num_hidden_layers, dora.lora.rank
    numbers = (5 + 3) * rows + rank * rows // layers + layers * 2 * work.positions * hidden
    assert peaks[1] - peaks[0] == pytest.approx(4 * numbers, abs=1)
