"""What a graph is given once: that it follows arrays that change, move and go, at every place it is run for."""

from __future__ import annotations

import gc
from importlib.util import find_spec
from types import ModuleType
from weakref import ref

import numpy as np
import pytest
from prepared_bundles import Prepared
from test_prepare import adapter_of, batch_of, rows_of

from edgetune.execution import ExecutionPlan
from edgetune.runtimes import OptimizerConfig, openvino, stock
from edgetune.runtimes.layered.bindings import Bindings

FIXED = OptimizerConfig(weight_decay=0.0, max_grad_norm=0.0)
RESIDENT = ExecutionPlan("layered", kept_layers=2, resident=True, head_rows=1024)
STREAMED = ExecutionPlan("layered", kept_layers=0, resident=False, head_rows=1024, head_tokens=100)


def test_an_array_is_renewed_when_it_is_another() -> None:
    bindings, array = Bindings(), np.zeros(3)
    assert bindings.renew("x", array) and not bindings.renew("x", array)
    assert bindings.renew("y", array), "each name has its own"
    assert bindings.renew("x", array.copy()) and bindings.renew("x", array)


def test_no_array_is_kept_alive() -> None:
    bindings, array = Bindings(), np.zeros(3)
    bindings.renew("x", array)
    alive = ref(array)
    del array
    gc.collect()
    assert alive() is None
    # Where the other one lay, perhaps.
    assert bindings.renew("x", np.zeros(3))


@pytest.mark.parametrize(
    ("runtime", "tolerance"),
    [
        pytest.param(stock, 1e-5, id="onnxruntime"),
        pytest.param(
            openvino,
            0.02,
            id="openvino",
            marks=pytest.mark.skipif(find_spec("openvino") is None, reason="openvino is not installed"),
        ),
    ],
)
@pytest.mark.parametrize("plan", [RESIDENT, STREAMED], ids=["resident", "streamed"])
def test_batches_of_a_session_do_not_mix(
    prepared: Prepared, runtime: ModuleType, tolerance: float, plan: ExecutionPlan
) -> None:
    """Gradients are those of sessions of their own whatever came before; of two batches, their mean by tokens."""
    bundle = prepared("multi-head", "int4")
    parameters = adapter_of(bundle)
    one, other = (batch_of(bundle, rows_of(seed, lengths)) for seed, lengths in ((0, [9, 12]), (1, [16])))
    alone = []
    for batch in (one, other):
        with runtime.open_session(bundle, parameters, FIXED, plan) as session:
            session.step([batch], 0.0)
            alone.append(session.gradients())
    with runtime.open_session(bundle, parameters, FIXED, plan) as session:
        for batch, expected in zip((one, other, one), (*alone, alone[0]), strict=True):
            session.step([batch], 0.0)
            for name, values in session.gradients().items():
                np.testing.assert_array_equal(values, expected[name], err_msg=name)
        session.step([one, other], 0.0)
        both = {name: values.copy() for name, values in session.gradients().items()}
        # What is trained moves, and graphs see it.
        before = session.evaluate(one)
        session.step([one], 0.1)
        assert session.evaluate(one) != before
    tokens = [batch.trained_tokens for batch in (one, other)]
    for name, values in both.items():
        mean = sum(count * gradient[name] for count, gradient in zip(tokens, alone, strict=True)) / sum(tokens)
        assert np.linalg.norm(values - mean) <= tolerance * np.linalg.norm(mean), name
