"""What a graph is given once: that it follows arrays that change, move and go, at every place it is run for."""

from __future__ import annotations

import gc
from dataclasses import replace
from importlib.util import find_spec
from types import ModuleType
from weakref import ref

import numpy as np
import pytest
from numpy.typing import NDArray

from edgetune.formats.bundle import Bundle
from edgetune.runtimes import onnxruntime as stock
from edgetune.runtimes import openvino
from edgetune.runtimes.contract import OptimizerConfig
from edgetune.runtimes.execution import ExecutionPlan, LayeredPlan
from edgetune.runtimes.layered.bindings import Bindings
from support.prepared_bundles import InPieces, Prepared
from support.random_rows import rows_of
from support.tiny_step import adapter_of, batch_of

FIXED = OptimizerConfig(weight_decay=0.0, max_grad_norm=0.0)
KEEP = LayeredPlan(kept_layers=2, resident=True, head_rows=1024)
PLANS = {
    "keep": KEEP,
    "recompute": replace(KEEP, kept_layers=1),
    "lean": replace(KEEP, kept_layers=1, lean=True),
    "int8 above an exact layer": replace(KEEP, precision="int8", exact_layers=1),
    "stream": replace(KEEP, kept_layers=0, lean=True, resident=False, head_tokens=100),
}
RUNTIMES = [
    pytest.param(stock, 1e-5, id="onnxruntime"),
    pytest.param(
        openvino,
        0.02,
        id="openvino",
        marks=pytest.mark.skipif(find_spec("openvino") is None, reason="openvino is not installed"),
    ),
]
INT8_TOLERANCE = 0.05
"""A batch that shares its step has gradients of another scale, which are rounded otherwise."""
on_each_runtime = pytest.mark.parametrize(("runtime", "tolerance"), RUNTIMES)


def test_an_array_is_known_by_itself() -> None:
    bindings, array = Bindings(), np.zeros(3)
    assert not bindings.has("x", array)
    bindings.note("x", array)
    assert bindings.has("x", array)
    assert not bindings.has("y", array) and not bindings.has("x", array[:])
    bindings.note("x", array.copy())
    assert not bindings.has("x", array)


def test_no_array_is_kept_alive() -> None:
    bindings, array = Bindings(), np.zeros(3)
    bindings.note("x", array)
    alive = ref(array)
    del array
    gc.collect()
    assert alive() is None
    # Where the other one lay, perhaps.
    assert not bindings.has("x", np.zeros(3))


@pytest.mark.own
@on_each_runtime
@pytest.mark.parametrize("plan", PLANS)
def test_batches_of_a_session_do_not_mix(
    prepared: Prepared, runtime: ModuleType, tolerance: float, plan: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if runtime is openvino:
        from edgetune.runtimes.layered.openvino import backend

        # Every other shape is compiled again.
        monkeypatch.setattr(backend, "MOST_SHAPES", 1)
    assert_batches_do_not_mix(prepared("multi-head", "int4"), runtime, tolerance, PLANS[plan])


@pytest.mark.own
@on_each_runtime
def test_nor_do_they_in_pieces(in_pieces: InPieces, runtime: ModuleType, tolerance: float) -> None:
    assert_batches_do_not_mix(in_pieces("grouped-query"), runtime, tolerance, KEEP)


def assert_batches_do_not_mix(bundle: Bundle, runtime: ModuleType, tolerance: float, plan: ExecutionPlan) -> None:
    """Gradients are those of sessions of their own whatever came before; of two batches, their mean by tokens."""
    parameters = adapter_of(bundle)
    one, other = (batch_of(bundle, rows_of(seed, lengths)) for seed, lengths in ((0, [9, 12]), (1, [16])))
    alone = []
    for batch in (one, other):
        with runtime.open_session(bundle, parameters, FIXED, plan) as session:
            session.step([batch], 0.0)
            alone.append(copies(session.gradients()))
    with runtime.open_session(bundle, parameters, FIXED, plan) as session:
        for batch, expected in zip((one, other, one), (*alone, alone[0]), strict=True):
            session.step([batch], 0.0)
            for name, values in session.gradients().items():
                np.testing.assert_array_equal(values, expected[name], err_msg=name)
            session.evaluate(one)
        session.step([one, other], 0.0)
        both = copies(session.gradients())
        # What is trained moves, and every graph sees it.
        session.step([one], 0.1)
        moved, loss = copies(session.adapter()), session.evaluate(one)
        session.step([one], 0.0)
        found = copies(session.gradients())
    tokens = [batch.trained_tokens for batch in (one, other)]
    tolerance = INT8_TOLERANCE if plan.precision == "int8" else tolerance
    for name, values in both.items():
        mean = sum(count * gradient[name] for count, gradient in zip(tokens, alone, strict=True)) / sum(tokens)
        assert np.linalg.norm(values - mean) <= tolerance * np.linalg.norm(mean), name
    with runtime.open_session(bundle, moved, FIXED, plan) as session:
        assert session.evaluate(one) == loss
        session.step([one], 0.0)
        for name, values in session.gradients().items():
            np.testing.assert_array_equal(values, found[name], err_msg=name)


@on_each_runtime
def test_what_stays_is_given_once(
    prepared: Prepared, runtime: ModuleType, tolerance: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    bundle = prepared("multi-head", "int4")
    batch = batch_of(bundle, rows_of(0, [9, 12]))
    given: list[str] = []
    note = Bindings.note

    def counted(self: Bindings, name: str, array: NDArray[np.generic]) -> None:
        given.append(name)
        note(self, name, array)

    monkeypatch.setattr(Bindings, "note", counted)
    counts = []
    with runtime.open_session(bundle, adapter_of(bundle), FIXED, KEEP) as session:
        for _ in range(3):
            given.clear()
            session.step([batch], 1e-3)
            counts.append(len(given))
    # The batch's tables are made in every step, and what the head takes and gives.
    assert counts[1] == counts[2] < counts[0] / 5, sorted(given)


def copies(arrays: dict[str, NDArray[np.float32]]) -> dict[str, NDArray[np.float32]]:
    """A session's own arrays change with its next step."""
    return {name: values.copy() for name, values in arrays.items()}
