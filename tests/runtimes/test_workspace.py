"""What is kept of hidden states, where one number of a row is enormous, as in trained models."""

from __future__ import annotations

from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest

from edgetune.config import PrepareConfig
from edgetune.formats.bundle import Bundle
from edgetune.runtimes import onnxruntime as stock
from edgetune.runtimes import openvino
from edgetune.runtimes.execution import LayeredPlan
from edgetune.runtimes.layered.onnxruntime.backend import OrtBackend
from edgetune.runtimes.layered.workspace import HiddenStates, Workspace
from support import massive_activations, oracle
from support.massive_activations import save_massive
from support.prepared_bundles import prepare_checkpoint
from support.random_rows import rows_of
from support.tiny_step import LEARNING_RATE, OPTIMIZER, adapter_of, batch_of

LARGEST = (24_890.0, 60_000.0, 5e6)
"""In the residual stream: of a real model, near the end of float16, and beyond what float16 and a constant can hold."""
STREAM = LayeredPlan(kept_layers=0, resident=False, lean=True, head_rows=16, head_tokens=100)
KEEP = LayeredPlan(kept_layers=massive_activations.LAYERS)
LEAN_ERROR, BF16_COSINE = 5e-3, 0.8
"""Beside 5e6 one tensor has 0.86 in bfloat16, beside 24,890 all have more than 0.985; its states are 128 wide."""


@pytest.fixture(scope="module", params=LARGEST, ids=lambda largest: f"{largest:g}")
def massive(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Bundle]:
    folder = tmp_path_factory.mktemp("massive")
    source = save_massive(folder / "checkpoint", request.param)
    config = PrepareConfig(base="fp32", rank=4, alpha=8.0, max_length=64)
    return source, prepare_checkpoint(source, folder / "bundle", config)


@pytest.fixture(scope="module")
def prepared_ort(massive: tuple[Path, Bundle]) -> OrtBackend:
    return OrtBackend(massive[1], "fp32")


@pytest.mark.parametrize("largest", [1.0, *LARGEST, 1e12, 3e38])
def test_states_in_16_bits_are_finite_and_near(prepared_ort: OrtBackend, largest: float) -> None:
    states = HiddenStates(Workspace(prepared_ort.storage), prepared_ort, short=True)
    shape = (2, 5, 64)
    hidden = states.array(0, shape, kept=True)
    hidden[...] = np.random.default_rng(0).standard_normal(shape)
    hidden[0, 0, 7] = -largest
    hidden[1, 3] = 0
    expected = hidden.copy()
    states.keep(0, hidden)
    hidden.fill(np.nan)
    found = states.take(0, shape)
    largest_of_row = np.abs(expected).max(axis=-1, keepdims=True)
    assert (np.abs(found - expected) <= 2**-11 * np.abs(expected) + 2**-39 * largest_of_row).all()


@pytest.mark.parametrize("plan", [KEEP, STREAM], ids=["keep", "stream"])
@pytest.mark.parametrize("runtime", ["onnxruntime", "openvino"])
def test_gradients_are_pytorchs_beside_a_massive_activation(
    massive: tuple[Path, Bundle], runtime: str, plan: LayeredPlan
) -> None:
    if runtime == "openvino" and find_spec("openvino") is None:
        pytest.skip("openvino is not installed")
    source, bundle = massive
    parameters = adapter_of(bundle)
    rows = [replace(row, input_ids=[1, *row.input_ids[1:]]) for row in rows_of(3, [17, 23])]
    model = oracle.peft_model(source, bundle, parameters)
    loss = oracle.loss(model, rows)
    loss.backward()
    module = stock if runtime == "onnxruntime" else openvino
    with module.open_session(bundle, parameters, OPTIMIZER, plan) as session:
        result = session.step([batch_of(bundle, rows)], LEARNING_RATE)
        found = session.gradients()  # type: ignore[attr-defined]
    assert result.loss == pytest.approx(loss.item(), rel=1e-4 if module is stock else 2e-3)
    for name, parameter in oracle.trainable(model).items():
        assert parameter.grad is not None
        expected = parameter.grad.numpy()
        if module is stock:
            assert oracle.relative(found[name], expected) <= LEAN_ERROR, name
        else:
            assert oracle.cosine(found[name], expected) >= BF16_COSINE, name
