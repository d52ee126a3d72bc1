"""The optimizer graph against torch.optim.AdamW and clip_grad_norm_."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime as ort
import pytest
import torch
from numpy.typing import NDArray

from edgetune.model.lora import Lora, Slot
from edgetune.preparation.graphs.adamw import build_adamw

Array = NDArray[np.float32]
LORA = Lora(4, 8.0, ["qkv_proj"], [Slot("layers.0.qkv_proj", 24, 40), Slot("layers.1.qkv_proj", 8, 16)])
STEPS = 20
STATES = ("", ".exp_avg", ".exp_avg_sq")


@pytest.fixture(scope="module")
def session() -> ort.InferenceSession:
    model = ir.to_proto(build_adamw(LORA))
    onnx.checker.check_model(model, full_check=True)
    return ort.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])


def gradients(step: int, kind: str) -> dict[str, Array]:
    """Gradients whose sizes differ by tensor and step, so that clipping comes and goes."""
    generator = np.random.default_rng(step)
    size = 10.0 ** generator.uniform(-3.5, -1)
    found = {
        name: (size * 3.0**index * generator.standard_normal(shape)).astype(np.float32)
        for index, (name, shape) in enumerate(LORA.shapes().items())
    }
    if kind == "zeros":
        return {name: np.zeros_like(value) for name, value in found.items()}
    if kind == "some zero":
        # As at the start of training: B is zero, and therefore the gradient of A.
        return {name: np.zeros_like(value) if step < 2 and "lora_A" in name else value for name, value in found.items()}
    return found


def scalar(value: float) -> Array:
    return np.array([value], np.float32)


def relative(found: Array, expected: Array) -> float:
    return float(np.linalg.norm(found - expected) / max(np.linalg.norm(expected), 1e-30))


@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
@pytest.mark.parametrize("max_grad_norm", [0.0, 1.0, 1e6], ids=["no clipping", "clipping", "out of reach"])
@pytest.mark.parametrize("kind", ["all", "some zero", "zeros"])
def test_twenty_steps_are_torchs(
    session: ort.InferenceSession, kind: str, max_grad_norm: float, weight_decay: float
) -> None:
    generator = np.random.default_rng(99)
    state = {name: generator.standard_normal(shape, dtype=np.float32) for name, shape in LORA.shapes().items()}
    parameters = {name: torch.nn.Parameter(torch.from_numpy(value.copy())) for name, value in state.items()}
    state |= {name + suffix: np.zeros_like(state[name]) for name in parameters for suffix in STATES[1:]}
    optimizer = torch.optim.AdamW(parameters.values(), weight_decay=weight_decay)
    clipped = 0
    for step in range(STEPS):
        learning_rate = 1e-2 * (1 - step / STEPS)
        given = gradients(step, kind)
        for name, parameter in parameters.items():
            parameter.grad = torch.from_numpy(given[name].copy())
        limit = max_grad_norm or float("inf")
        norm = float(torch.nn.utils.clip_grad_norm_(parameters.values(), limit))
        clipped += norm > limit
        optimizer.param_groups[0]["lr"] = learning_rate
        optimizer.step()
        feed = {
            "learning_rate": scalar(learning_rate),
            "weight_decay": scalar(weight_decay),
            "max_grad_norm": scalar(max_grad_norm),
            "step": scalar(step + 1),
        }
        names = [output.name for output in session.get_outputs()]
        results = session.run(names, feed | state | {f"{name}.grad": value for name, value in given.items()})
        found = dict(zip(names, results, strict=True))
        np.testing.assert_allclose(found.pop("grad_norm"), [norm], rtol=1e-6)
        state = {name.removesuffix(".next"): value for name, value in found.items()}
    comes_and_goes = max_grad_norm == 1.0 and kind != "zeros"
    assert (0 < clipped < STEPS) == comes_and_goes
    for name, parameter in parameters.items():
        expected = {
            "": parameter.detach().numpy(),
            ".exp_avg": optimizer.state[parameter]["exp_avg"].numpy(),
            ".exp_avg_sq": optimizer.state[parameter]["exp_avg_sq"].numpy(),
        }
        for suffix in STATES:
            assert relative(state[name + suffix], expected[suffix]) <= 1e-6, name + suffix


def test_contract(session: ort.InferenceSession) -> None:
    inputs = {value.name: tuple(value.shape) for value in session.get_inputs()}
    shapes = LORA.shapes()
    scalars = dict.fromkeys(["learning_rate", "weight_decay", "max_grad_norm", "step"], (1,))
    states = {f"{name}{s}": shape for name, shape in shapes.items() for s in ("", ".grad", ".exp_avg", ".exp_avg_sq")}
    assert inputs == scalars | states
    outputs = {value.name: tuple(value.shape) for value in session.get_outputs()}
    following = {f"{name}{suffix}.next": shape for name, shape in shapes.items() for suffix in STATES}
    assert outputs == {"grad_norm": (1,)} | following
    assert {value.type for value in [*session.get_inputs(), *session.get_outputs()]} == {"tensor(float)"}


def test_is_standard_onnx_without_scalars(tmp_path: Path) -> None:
    ir.save(build_adamw(LORA), tmp_path / "adamw.onnx")
    model = onnx.load(tmp_path / "adamw.onnx")
    assert model.ir_version == 10
    assert [(opset.domain, opset.version) for opset in model.opset_import] == [("", 21)]
    assert {node.domain for node in model.graph.node} == {""}
    inferred = onnx.shape_inference.infer_shapes(model, strict_mode=True, data_prop=True)
    shapes = [value.type.tensor_type.shape for value in [*inferred.graph.value_info, *inferred.graph.output]]
    assert len(shapes) >= len(model.graph.node)
    assert all(len(shape.dim) > 0 for shape in shapes)


@pytest.mark.parametrize("bad", [np.inf, -np.inf, np.nan])
def test_norm_shows_a_gradient_that_is_not_finite(session: ort.InferenceSession, bad: float) -> None:
    feed = {name: scalar(0.1) for name in ("learning_rate", "weight_decay", "max_grad_norm", "step")}
    feed |= {value.name: np.zeros(value.shape, np.float32) for value in session.get_inputs() if value.name not in feed}
    feed["layers.1.qkv_proj.lora_B.weight.grad"][3, 1] = bad
    (norm,) = session.run(["grad_norm"], feed)
    assert not np.isfinite(norm).any()
