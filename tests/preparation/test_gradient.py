"""Differentiation: the coverage report, what has no gradient, and the four artifacts in ONNX Runtime Training."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import pytest
import torch
from numpy.typing import NDArray

from edgetune.config import TrainConfig
from edgetune.errors import IncompatibleError
from edgetune.preparation.gradient import differentiate
from edgetune.preparation.rewrites.shapes import resolve_shapes
from edgetune.side_environment import run_worker
from support.prepared_bundles import Prepared
from support.repository import ROOT
from support.tiny_phi3 import silent

ARTIFACT_WORKER = ROOT / "tests" / "support" / "artifact_worker.py"
ARTIFACTS = {"training_model.onnx", "eval_model.onnx", "optimizer_model.onnx", "checkpoint"}
FORWARD = """
  <ir_version: 10, opset_import: ["": 18]>
  forward (float[batch,sequence,4] x, float[4,3] p, float[1,3] q, float[1] loss_scale)
    => (float[1] objective, float[1] loss, float[batch,sequence,3] logits)
  <int64[1] one = {{1}}, float two = {{2.0}}>
  {{
    fixed = Asin(x)
    product = MatMul(x, p)
    logits = Add(product, q)
    {nodes}
    mean = ReduceMean<keepdims=0>(last)
    loss = Reshape(mean, one)
    objective = Mul(loss, loss_scale)
  }}
"""
"""What `resolve_shapes(export_forward(…))` gives, in small; `fixed` lies on no gradient's path."""
SQUARE = "square = Mul(logits, logits)\n shift = ReduceMean<keepdims=0>(fixed)\n last = Add(square, shift)"
WITHOUT_GRADIENT = {
    "last = Asin(logits)": ["Asin"],
    "a = Asin(logits)\n b = Round(a)\n c = Mod<fmod=1>(b, two)\n d = Exp(c)\n last = Floor(d)": [
        "Asin", "Round", "Mod", "Floor",
    ],
}  # fmt: skip


def forward(nodes: str) -> ir.Model:
    model = onnx.parser.parse_model(FORWARD.format(nodes=nodes))
    for node in model.graph.node:
        node.name = f"{node.op_type}_of_{node.output[0]}"
    return resolve_shapes(ir.from_proto(model))


def parameters() -> dict[str, NDArray[np.float32]]:
    generator = np.random.default_rng(5)
    return {name: generator.standard_normal(s, dtype=np.float32) for name, s in [("p", (4, 3)), ("q", (1, 3))]}


@pytest.mark.parametrize("nodes", WITHOUT_GRADIENT, ids=["one", "several"])
def test_operators_without_gradient_are_named_with_node_and_reason(nodes: str, tmp_path: Path) -> None:
    with pytest.raises(IncompatibleError) as caught:
        differentiate(forward(nodes), parameters(), tmp_path, silent)
    message = str(caught.value)
    for operator in WITHOUT_GRADIENT[nodes]:
        assert f"{operator} ({operator}_of_" in message
        assert f"registered: {operator} for node" in message
    for fine in ("MatMul", "Add", "Exp", "ReduceMean", "/onnxruntime_src"):
        assert fine not in message
    assert not list(tmp_path.iterdir()), "nothing is written"


def test_coverage_counts_what_lies_between_parameters_and_objective(tmp_path: Path) -> None:
    coverage = differentiate(forward(SQUARE), parameters(), tmp_path, silent)
    # Neither Asin nor the mean of it: no gradient flows there.
    assert coverage == {"MatMul": 1, "Add": 2, "Mul": 2, "ReduceMean": 1, "Reshape": 1}
    assert {file.name for file in tmp_path.iterdir()} == ARTIFACTS


def test_artifacts_train_as_torch_does(tmp_path: Path) -> None:
    differentiate(forward(SQUARE), parameters(), tmp_path, silent)
    x = np.random.default_rng(6).uniform(-1, 1, (2, 3, 4)).astype(np.float32)
    np.savez(tmp_path / "inputs.npz", x=x, loss_scale=np.ones(1, np.float32))
    run_worker(ARTIFACT_WORKER, [str(tmp_path), str(tmp_path / "inputs.npz"), "5"])
    found = np.load(tmp_path / "result.npz")
    values = {name: torch.nn.Parameter(torch.from_numpy(value)) for name, value in parameters().items()}
    given = torch.from_numpy(x)
    defaults = TrainConfig()
    optimizer = torch.optim.AdamW(values.values(), lr=0.01, weight_decay=defaults.weight_decay)
    for step in range(5):
        loss = ((given @ values["p"] + values["q"]) ** 2 + torch.asin(given).mean()).mean()
        optimizer.zero_grad()
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(values.values(), defaults.max_grad_norm)
        optimizer.step()
        if step == 0:
            np.testing.assert_allclose(found["evaluated"], [loss.item()], rtol=1e-5)
        np.testing.assert_allclose(found["loss"][step], loss.item(), rtol=1e-5)
        np.testing.assert_allclose(found["norm"][step], norm.item(), rtol=1e-5)
    assert norm > defaults.max_grad_norm, "clipping must be seen"
    for name, value in values.items():
        np.testing.assert_allclose(found[name], value.detach().numpy(), rtol=1e-5, atol=1e-6)


def test_prepared_bundles_report_their_coverage(prepared: Prepared) -> None:
    coverage = prepared("multi-head", "int4").manifest.gradient_coverage
    # A layer: two products in attention, and for each of four projections the frozen one, A and B. Nothing flows
    # through the first frozen projection of the first layer. The head comes last.
    assert coverage["MatMul"] == 2 * (2 + 4 * 3) - 1 + 1
    assert coverage["Softmax"] == 2
    assert coverage["SoftmaxCrossEntropyLoss"] == 1
    assert "Gather" not in coverage, "nothing flows into the embedding"
