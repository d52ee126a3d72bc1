"""A starts with the right singular vectors of the dense gradient, which PyTorch computes."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from edgetune.config import TrainConfig
from edgetune.errors import UsageError
from edgetune.model.lora import initial_parameters
from edgetune.runtimes import onnxruntime as stock
from edgetune.runtimes.execution import ExecutionPlan, LayeredPlan, WholePlan
from edgetune.training import train
from edgetune.training.gradient_start import start_from_gradient
from support import oracle
from support.golden import BUNDLE, TRAIN
from support.prepared_bundles import Prepared
from support.random_rows import lengths_of, rows_of
from support.recorder import Recorder
from support.tiny_phi3 import checkpoint
from support.tiny_step import OPTIMIZER, batch_of

VARIANT = "grouped-query"
PLANS: dict[str, ExecutionPlan] = {"whole": WholePlan(), "keep": LayeredPlan(kept_layers=2)}


@pytest.mark.parametrize("plan", PLANS)
def test_a_is_what_a_decomposition_of_the_dense_gradient_gives(prepared: Prepared, plan: str) -> None:
    """A sketch of r columns finds nearly all that r columns can hold; random rows hold next to nothing."""
    bundle = prepared(VARIANT, "fp32")
    lora = bundle.manifest.lora
    parameters = initial_parameters(lora, 0)
    rows = rows_of(1, lengths_of(VARIANT, 1))
    model = oracle.peft_model(checkpoint(VARIANT), bundle, parameters)
    dense = {name: module.base_layer.weight for name, module in model.named_modules() if hasattr(module, "base_layer")}
    for weight in dense.values():
        weight.requires_grad_(True)
    oracle.loss(model, rows).backward()
    with stock.open_session(bundle, parameters, OPTIMIZER, PLANS[plan]) as session:
        before = {name: array.copy() for name, array in session.state().items()}
        start_from_gradient(session, lora, [batch_of(bundle, rows)])
        started = session.adapter()
        after = session.state()
    assert int(after["steps"]) == int(before["steps"]) == 0
    moments = [name for name in before if "exp_avg" in name]
    assert moments and all(np.array_equal(after[name], before[name]) for name in moments)
    for slot in lora.slots:
        (weight,) = (value for name, value in dense.items() if name.endswith(slot.name))
        assert weight.grad is not None
        gradient = weight.grad.numpy().astype(np.float64)
        a = started[slot.a].astype(np.float64)
        np.testing.assert_array_equal(started[slot.b], 0)
        np.testing.assert_allclose(3 * a @ a.T, np.eye(len(a)), atol=1e-5, err_msg=slot.name)
        best = np.sqrt((np.linalg.svd(gradient, compute_uv=False)[: len(a)] ** 2).sum())
        held = np.linalg.norm(gradient @ (np.sqrt(3) * a).T)
        by_chance = np.linalg.norm(gradient @ np.linalg.qr(parameters[slot.a].T)[0])
        assert held >= 0.9 * best, slot.name
        assert held > 1.5 * by_chance, slot.name


def test_a_run_learns_faster(tmp_path: Path) -> None:
    losses = {}
    for init in ("random", "gradient"):
        config = TrainConfig(
            runtime="onnxruntime", steps=12, batch_size=4, learning_rate=1e-2, schedule="constant", init=init
        )
        seen = Recorder()
        train(BUNDLE, TRAIN, tmp_path / init, config, observer=seen)
        losses[init] = [step.loss for step in seen.steps]
    assert losses["gradient"][0] == losses["random"][0], "the first model is the base"
    assert losses["gradient"][-1] < losses["random"][-1]


@pytest.mark.parametrize("options", [{"runtime": "ort-training"}, {"method": "forward-only"}], ids=str)
def test_what_gives_no_gradients_by_name_is_refused(tmp_path: Path, options: dict[str, str]) -> None:
    with pytest.raises(UsageError, match="--init gradient needs gradients"):
        train(BUNDLE, TRAIN, tmp_path / "adapter", TrainConfig(init="gradient", **options))  # type: ignore[arg-type]
