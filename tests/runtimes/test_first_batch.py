"""Massive activations on Qualcomm's emulated NPU: right, or refused before the first step."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import suppress
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import pytest
from numpy.typing import NDArray

from edgetune.data.batches import Batch
from edgetune.data.encode import Example
from edgetune.errors import IncompatibleError
from edgetune.formats.bundle import Bundle
from edgetune.formats.roles import HALF_LOSS, HALF_STEP
from edgetune.runtimes import onnxruntime as stock
from edgetune.runtimes import qnn
from edgetune.runtimes.execution import Accelerator, WholePlan
from edgetune.runtimes.whole.first_batch import HALF, FirstBatch, first_beyond_half
from edgetune.runtimes.whole.session import Buffers, CpuGraphs
from support.massive_activations import save_massive
from support.oracle import cosine
from support.prepared_bundles import CONFIG, prepare_checkpoint
from support.tiny_step import LEARNING_RATE, OPTIMIZER, adapter_of, batch_of

installed = pytest.mark.skipif(find_spec("onnxruntime_qnn") is None, reason="onnxruntime-qnn is not installed")
NPU_ONLY = WholePlan(accelerator=Accelerator(require=True))
LOSS, WORST_COSINE = 5e-3, 0.99
SQUARED, HELD, BEYOND = 11_112.0, 60_000.0, 134_000.0
"""Activations whose square float16 does not hold, that it just holds itself, and that it does not."""
ONE = {"loss_scale": np.ones(1, np.float32)}
PRECISION = "INFERENCE_PRECISION_HINT"
_SHARE = 0.44646
"""What the adapter and the int4 base leave of the activation that the checkpoint was made for."""

_folders: list[TemporaryDirectory[str]] = []


@cache
def massive(largest: float) -> Bundle:
    """A bundle that lives as long as the process: two tests take it."""
    _folders.append(TemporaryDirectory(prefix="edgetune-tests-"))
    folder = Path(_folders[-1].name)
    return prepare_checkpoint(save_massive(folder / "checkpoint", largest / _SHARE), folder / "bundle", CONFIG)


def batch(bundle: Bundle) -> Batch:
    """One row that begins as the massive activation wants it."""
    ids = [1, *np.random.default_rng(3).integers(3, 400, 23).tolist()]
    return batch_of(bundle, [Example(1, ids, ids)])


def on_the_cpu(bundle: Bundle) -> tuple[float, dict[str, NDArray[np.float32]]]:
    with stock.open_session(bundle, adapter_of(bundle), OPTIMIZER, WholePlan()) as session:
        result = session.step([batch(bundle)], LEARNING_RATE)
        return result.loss, dict(session.gradients())  # type: ignore[attr-defined]


@pytest.mark.own
@installed
def test_float16_holds_what_it_cannot_square() -> None:
    bundle = massive(SQUARED)
    expected, gradients = on_the_cpu(bundle)
    with qnn.RUNTIME.open_session(bundle, adapter_of(bundle), OPTIMIZER, NPU_ONLY) as session:
        result = session.step([batch(bundle)], LEARNING_RATE)
        found = dict(session.gradients())  # type: ignore[attr-defined]
    assert result.loss == pytest.approx(expected, rel=LOSS)
    assert min(cosine(found[name], value) for name, value in gradients.items()) >= WORST_COSINE


@pytest.mark.own
@installed
@pytest.mark.parametrize("largest", [HELD, BEYOND])
def test_what_float16_hardly_holds_is_right_or_refused(largest: float) -> None:
    """Where the accelerator saturates, the norm's direction may be right all the same."""
    bundle = massive(largest)
    expected, gradients = on_the_cpu(bundle)
    with qnn.RUNTIME.open_session(bundle, adapter_of(bundle), OPTIMIZER, NPU_ONLY) as session:
        try:
            result = session.step([batch(bundle)], LEARNING_RATE)
        except IncompatibleError as error:
            assert "where float32 has" in str(error)
            assert (" reaches " in str(error)) is (largest == BEYOND)
            return
        found = dict(session.gradients())  # type: ignore[attr-defined]
    assert result.loss == pytest.approx(expected, rel=HALF.loss)
    assert together(found, gradients) >= HALF.cosine


def together(found: Mapping[str, NDArray[np.float32]], expected: Mapping[str, NDArray[np.float32]]) -> float:
    """The cosine of all gradients as one."""
    return cosine(*(np.concatenate([each[name].ravel() for name in expected]) for each in (found, expected)))


def results(bundle: Bundle) -> tuple[Buffers, float, dict[str, NDArray[np.float32]]]:
    import onnxruntime as ort

    parameters = adapter_of(bundle)
    buffers = {name: ort.OrtValue.ortvalue_from_numpy(array) for name, array in parameters.items()}
    sums = {f"{name}.grad": np.zeros_like(array) for name, array in parameters.items()}
    loss = CpuGraphs(bundle).gradients(batch(bundle), 0.5, buffers, sums)
    return buffers, loss, sums


@pytest.mark.parametrize("case", ["equal", "loss", "no number", "direction", "zero"])
def test_the_first_batch_alone_is_compared(case: str) -> None:
    bundle = massive(SQUARED)
    buffers, loss, sums = results(bundle)
    if case == "direction":
        sums = {name: np.abs(array) for name, array in sums.items()}
    if case == "zero":
        sums = {name: np.zeros_like(array) for name, array in sums.items()}
    loss = {"loss": 1.1 * loss, "no number": float("nan")}.get(case, loss)
    first = FirstBatch(bundle, HALF)
    if case == "equal":
        first.gradients("NPU", batch(bundle), 0.5, buffers, loss, sums)
        first.loss("NPU", batch(bundle), buffers, loss)
    else:
        what = "a loss of" if case in ("loss", "no number") else "gradients of norm"
        with pytest.raises(IncompatibleError, match=f"NPU computes {what} .* where float32 has .*first batch;"):
            first.gradients("NPU", batch(bundle), 0.5, buffers, loss, sums)
    # Once for a session: steps are not computed twice.
    first.gradients("NPU", batch(bundle), 0.5, buffers, 2 * loss, sums)


def test_the_tensor_is_named_that_float16_does_not_hold() -> None:
    for largest, found in ((HELD, False), (BEYOND, True)):
        bundle = massive(largest)
        feed = {**batch(bundle).tensors(), **adapter_of(bundle), **ONE}
        beyond = first_beyond_half(bundle.file(HALF_STEP), feed)
        assert (beyond is not None) is found
        if beyond is not None:
            assert beyond[1] == pytest.approx(largest, rel=0.05)


@pytest.mark.parametrize(("largest", "named"), [(HELD, False), (BEYOND, True)])
def test_no_square_is_named_that_the_accelerator_does_not_compute(largest: float, named: bool) -> None:
    """The float32 graph squares what the one for float16 holds."""
    bundle = massive(largest)
    assert first_beyond_half(bundle.file("step"), {**batch(bundle).tensors(), **adapter_of(bundle), **ONE}) is not None
    buffers, loss, sums = results(bundle)
    first = FirstBatch(bundle, HALF)
    for compare in (
        lambda: first.gradients("NPU", batch(bundle), 0.5, buffers, 2 * loss, sums),
        lambda: first.loss("NPU", batch(bundle), buffers, 2 * loss),
    ):
        with pytest.raises(IncompatibleError, match="NPU computes a loss of") as refused:
            compare()
        assert (" reaches " in str(refused.value)) is named


@pytest.mark.own
@pytest.mark.skipif(find_spec("openvino") is None, reason="openvino is not installed")
def test_openvino_in_float16_is_right_or_refused() -> None:
    """Its CPU device computes in float16 on processors of Arm's, or where it is told to."""
    from edgetune.runtimes import openvino
    from edgetune.runtimes.openvino_core import core

    if "FP16" not in core().get_property("CPU", "OPTIMIZATION_CAPABILITIES"):
        pytest.skip("OpenVINO does not compute in float16 on this processor")
    bundle = massive(SQUARED)
    expected, gradients = on_the_cpu(bundle)
    before = core().get_property("CPU", PRECISION)
    core().set_property("CPU", {PRECISION: "f16"})
    try:
        with openvino.open_session(bundle, adapter_of(bundle), OPTIMIZER, WholePlan()) as session:
            assert session.evaluate(batch(bundle)) == pytest.approx(expected, rel=LOSS)
            with suppress(IncompatibleError):
                session.step([batch(bundle)], LEARNING_RATE)
                found = dict(session.gradients())  # type: ignore[attr-defined]
                assert together(found, gradients) >= HALF.cosine
            placements = session.placements()  # type: ignore[attr-defined]
    finally:
        core().set_property("CPU", {PRECISION: before})
    assert [(each.graph, each.device) for each in placements] == [(HALF_LOSS, "CPU, f16"), (HALF_STEP, "CPU, f16")]
