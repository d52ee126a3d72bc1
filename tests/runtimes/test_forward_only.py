"""Training without a backward pass: the estimate, the step, and what a run opens."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from edgetune.config import PlanName, TrainConfig
from edgetune.data.batches import Batch, make_batch
from edgetune.data.encode import Example
from edgetune.errors import UsageError
from edgetune.formats.bundle import Bundle
from edgetune.model.rope import Rope
from edgetune.runtimes import find_runtime, openvino_core
from edgetune.runtimes.contract import OptimizerConfig
from edgetune.runtimes.execution import LayeredPlan, WholePlan
from edgetune.runtimes.forward_only import ForwardOnlySession, QueryConfig, signs
from edgetune.training import TrainResult, train
from support.bigram_runtime import BigramSession
from support.bundle_copy import copy_of_bundle
from support.golden import GOLDEN
from support.prepared_bundles import Prepared
from support.random_rows import rows_of
from support.recorder import Recorder, metrics
from support.tiny_bundle import make_bundle, some_rows, write_rows
from support.tiny_step import adapter_of, batch_of

SHAPES = {"one.lora_B.weight": (3, 5), "two.lora_B.weight": (7, 3)}
SIZE = 36
STEP = 0.5
"""A quadratic has no third derivative, so that no perturbation is too large."""
FROZEN = "one.lora_A.weight"
FORWARD_ONLY = TrainConfig(method="forward-only", queries=8, batch_size=4)
needs_qnn = pytest.mark.skipif(find_spec("onnxruntime_qnn") is None, reason="onnxruntime-qnn is not installed")
needs_openvino = pytest.mark.skipif(find_spec("openvino") is None, reason="openvino is not installed")


class Quadratic:
    """½ (x − c)ᵀ H (x − c), as many times as a batch has trained tokens; follows `contract.Forward`."""

    def __init__(self) -> None:
        generator = np.random.default_rng(5)
        root = generator.normal(size=(SIZE, SIZE))
        self.hessian = root @ root.T / SIZE
        self.centre = generator.normal(size=SIZE)
        self.parameters = {name: generator.normal(size=shape).astype(np.float32) for name, shape in SHAPES.items()}
        self.evaluations = 0
        self.broken_at = 0

    def set_parameter(self, name: str, values: np.ndarray) -> None:
        assert values.dtype == np.float32
        assert values.shape == SHAPES[name]
        self.parameters[name] = values.copy()

    def evaluate(self, batch: Batch) -> float:
        self.evaluations += 1
        if self.evaluations == self.broken_at:
            return float("inf")
        return self.loss(flat(self.parameters)) * batch.trained_tokens

    def loss(self, x: np.ndarray) -> float:
        offset = x.astype(np.float64) - self.centre
        return float(0.5 * offset @ self.hessian @ offset)

    def gradient(self, x: np.ndarray) -> np.ndarray:
        return np.asarray(self.hessian @ (x.astype(np.float64) - self.centre))


def flat(parameters: Any) -> np.ndarray:
    return np.concatenate([parameters[name].ravel() for name in SHAPES])


def rows_with(trained: int) -> Batch:
    """A batch with so many trained tokens."""
    ids = list(range(3, 4 + trained))
    return make_batch([Example(1, ids, [-100, *ids[1:]])], Rope(8, 1e4, 1.0, None, None, 64), 0)


def session_of(
    model: Quadratic, *, queries: int = 4, seed: int = 0, size: float = STEP, **optimizer: float
) -> ForwardOnlySession:
    config = QueryConfig(queries, size, seed)
    return ForwardOnlySession(
        model,
        {**model.parameters, FROZEN: np.ones((2, 2), np.float32)},
        OptimizerConfig(**{"weight_decay": 0.0, "max_grad_norm": 0.0, **optimizer}),
        config,
    )


ONE = [rows_with(1)]


def test_directions_are_the_documented_bits_of_philox() -> None:
    found = signs(seed=3, step=2, query=1, parameter=4, size=100)
    words = np.random.Philox(key=3, counter=[0, 4, 1, 2]).random_raw(2)
    bits = [(int(words[place // 64]) >> (place % 64)) & 1 for place in range(100)]
    np.testing.assert_array_equal(found, [1.0 if bit else -1.0 for bit in bits])
    # What another machine, version or language has to give.
    assert "".join("+" if sign > 0 else "-" for sign in found[:32]) == "++--+--+-+-+-+++--+----++++--++-"


def test_every_direction_is_another_one() -> None:
    keys = [(0, 1, 0, 0), (1, 1, 0, 0), (0, 2, 0, 0), (0, 1, 1, 0), (0, 1, 0, 1)]
    drawn = [signs(*key, 4096) for key in keys]
    products = np.array(drawn) @ np.array(drawn).T / 4096
    np.testing.assert_allclose(products, np.eye(len(keys)), atol=0.1)  # 6 standard deviations


@pytest.mark.parametrize("queries", [2, 8])
def test_the_estimate_is_unbiased(queries: int) -> None:
    model = Quadratic()
    start = flat(model.parameters)
    exact = model.gradient(start)
    estimates = np.array(
        [flat(session_of(model, queries=queries, seed=seed).gradient(ONE)) for seed in range(8_000 // queries)]
    )
    mean, error = estimates.mean(axis=0), estimates.std(axis=0) / np.sqrt(len(estimates))
    assert np.abs((mean - exact) / error).max() < 5
    assert np.linalg.norm(mean - exact) < 0.15 * np.linalg.norm(exact)
    np.testing.assert_array_equal(flat(model.parameters), start)


@pytest.mark.parametrize("queries", [2, 8, 32])
def test_the_cosine_is_what_theory_says(queries: int) -> None:
    model = Quadratic()
    exact = model.gradient(flat(model.parameters))
    cosines = []
    for seed in range(400):
        estimate = flat(session_of(model, queries=queries, seed=seed).gradient(ONE))
        cosines.append(estimate @ exact / np.linalg.norm(estimate) / np.linalg.norm(exact))
    # The comparison with the others' mean takes one direction: of q queries, q − 1 count.
    expected = np.sqrt((queries - 1) / (queries - 1 + SIZE))
    assert np.sqrt(np.mean(np.square(cosines))) == pytest.approx(expected, rel=0.15)
    assert np.mean(cosines) > 0.5 * expected


def scales_of(answers: list[list[float]]) -> np.ndarray:
    """By what the two parameters are moved, from how the loss answered to each, one after the other."""
    squares = []
    for size, slopes in zip((15, 21), answers, strict=True):
        ages = 0.98 ** np.arange(len(slopes))[::-1]
        squares.append(np.average(np.square(slopes), weights=ages) / size)
    scales = np.array(squares) ** -0.25
    return np.asarray(scales / np.sqrt((15 * scales[0] ** 2 + 21 * scales[1] ** 2) / SIZE))


@pytest.mark.parametrize(
    ("limit", "size", "rates"),
    [
        ("rate", STEP, [0.03, 0.02, 0.01]),
        ("curvature", 5.0, [10.0, 10.0, 10.0]),
        ("curvature", 5.0, [10.0, 8.0, 4.0]),
        ("perturbation", 0.05, [10.0, 10.0, 10.0]),
    ],
)
def test_steps_are_those_of_a_reference(limit: str, size: float, rates: list[float]) -> None:
    queries = 5
    model = Quadratic()
    session = session_of(model, queries=queries, seed=9, size=size, weight_decay=0.01, max_grad_norm=4.0)
    batches = [rows_with(3), rows_with(1)]
    # 3 tokens of 4 with three times the loss, and 1 with the loss itself.
    scale = (3 * 3 + 1) / 4
    x = flat(model.parameters).astype(np.float64)
    parts = (np.arange(SIZE) < 15, np.arange(SIZE) >= 15)
    norms, clipped, curvatures = [], [], []
    answers: list[list[float]] = [[], []]

    def direction(number: int, query: int) -> np.ndarray:
        return np.concatenate([signs(9, number, query, 0, 15), signs(9, number, query, 1, 21)])

    def probe(number: int, place: int) -> None:
        moved = x + 10 * size * direction(number, queries) * parts[place]
        answers[place].append(scale * (model.loss(moved) - model.loss(x)) / (10 * size))

    for number, rate in enumerate(rates, start=1):
        if number == 1:
            probe(number, 0)
            probe(number, 1)
        widths = scales_of(answers) @ np.array(parts)
        directions = [widths * direction(number, query) for query in range(queries)]
        loss = scale * model.loss(x)
        losses = np.array([scale * model.loss(x + size * each) for each in directions])
        slopes = (losses - (losses.sum() - losses) / (queries - 1)) / size
        norms.append(np.sqrt(np.mean(slopes**2)))
        clip = min(1.0, 4.0 / (norms[-1] + 1e-6))
        clipped.append(clip * norms[-1])
        curvatures.append(2 * (losses.mean() - loss) / size**2)
        ages = 0.98 ** np.arange(number)[::-1]
        norm, usual = (np.sqrt(np.average(np.square(each), weights=ages)) for each in (norms, clipped))
        limits = {
            "rate": rate,
            "curvature": 0.3 * rate / max(rates) * norm / max(np.average(curvatures, weights=ages), 1e-8),
            "perturbation": size / np.sqrt(queries),
        }
        assert min(limits, key=lambda name: limits[name]) == limit
        if number > 1:
            probe(number, (number - 1) % 2)
        result = session.step(batches, rate)
        assert result.applied
        assert result.loss == pytest.approx(loss, rel=1e-5)
        assert result.grad_norm == pytest.approx(norms[-1], rel=1e-3)
        change = sum(slope * each for slope, each in zip(slopes, directions, strict=True))
        x = (1 - rate * 0.01) * x - limits[limit] * clip / usual * change
        np.testing.assert_allclose(flat(session.adapter()), x, rtol=2e-3, atol=2e-4)
        np.testing.assert_array_equal(session.adapter()[FROZEN], 1)
        # What is measured from now on is what was learnt.
        np.testing.assert_array_equal(flat(model.parameters), flat(session.adapter()))
        x = flat(session.adapter()).astype(np.float64)


def test_what_the_loss_answers_to_strongly_is_moved_less() -> None:
    model = Quadratic()
    # The second parameter counts a hundred times less.
    model.hessian[15:] *= 1e-2
    model.hessian[:, 15:] *= 1e-2
    session = session_of(model, queries=64, max_grad_norm=0.0)
    before = flat(model.parameters)
    session.step(ONE, 1e-3)
    moved = np.square(flat(model.parameters) - before)
    assert moved[15:].mean() > 2 * moved[:15].mean()
    # Nevertheless the estimate is that of the gradient.
    exact, estimates = model.gradient(flat(model.parameters)), []
    for _ in range(300):
        session.step(ONE, 0.0)
        estimates.append(flat(session.gradient(ONE)))
    mean, error = np.mean(estimates, axis=0), np.std(estimates, axis=0) / np.sqrt(len(estimates))
    assert np.abs((mean - exact) / error).max() < 5
    assert np.linalg.norm(mean - exact) < 0.1 * np.linalg.norm(exact)


def test_a_first_step_moves_every_parameter_by_the_learning_rate_for_each_query() -> None:
    squares = []
    for seed in range(100):
        model = Quadratic()
        before = flat(model.parameters)
        session_of(model, queries=4, seed=seed).step(ONE, 0.001)
        squares.append((flat(model.parameters) - before) ** 2)
    # Independent queries add up like noise. Beside it there is the gradient itself, which many parameters would hide.
    assert np.sqrt(np.mean(squares)) == pytest.approx(0.001 * np.sqrt(4 * (1 + 3 / SIZE)), rel=0.05)


def test_steps_that_would_lose_more_than_they_gain_are_shortened() -> None:
    model = Quadratic()
    session = session_of(model, queries=16)
    losses = [session.step(ONE, 1.0).loss for _ in range(200)]
    assert losses[-1] < 0.2 * losses[0]
    assert max(losses) < 1.5 * losses[0]


def test_nothing_drifts_when_nothing_is_learnt() -> None:
    model = Quadratic()
    before = flat(model.parameters)
    session = session_of(model)
    for _ in range(50):
        session.step(ONE, 0.0)
    np.testing.assert_array_equal(flat(model.parameters), before)
    np.testing.assert_array_equal(flat(session.adapter()), before)


@pytest.mark.parametrize("broken_at", [1, 2, 5])
def test_a_loss_that_is_not_finite_changes_nothing(broken_at: int) -> None:
    model, twin = Quadratic(), Quadratic()
    session, other = session_of(model), session_of(twin)
    model.broken_at = broken_at
    before = flat(model.parameters)
    assert not session.step(ONE, 0.1).applied
    np.testing.assert_array_equal(flat(model.parameters), before)
    # It goes on as if that step had not been.
    for each in (session, other):
        assert each.step(ONE, 0.1).applied
    np.testing.assert_array_equal(flat(session.adapter()), flat(other.adapter()))


def test_a_step_takes_one_pass_a_query_one_for_the_loss_and_one_for_a_matrix_alone() -> None:
    model = Quadratic()
    session = session_of(model, queries=6)
    session.step([rows_with(1), rows_with(2)], 0.1)
    assert model.evaluations == 2 * (6 + 1 + len(SHAPES)), "all matrices in the first step"
    session.step([rows_with(1), rows_with(2)], 0.1)
    assert model.evaluations == 2 * (6 + 1 + len(SHAPES)) + 2 * (6 + 1 + 1)


@pytest.fixture
def bigram(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Bundle:
    monkeypatch.setattr("edgetune.runtimes.RUNTIMES", {"onnxruntime": "support.bigram_runtime"})
    monkeypatch.setattr(BigramSession, "break_at", 0)
    return make_bundle(tmp_path / "bundle")


def run(bundle: Bundle, data: Path, config: TrainConfig, output: Path) -> tuple[TrainResult, Recorder]:
    recorder = Recorder()
    return train(bundle.path, data, output, config, observer=recorder), recorder


def test_the_loop_learns_without_a_gradient(bigram: Bundle, tmp_path: Path) -> None:
    data = write_rows(tmp_path / "train.jsonl", some_rows(10))
    config = replace(FORWARD_ONLY, learning_rate=0.2, perturbation_size=0.1, steps=200, schedule="linear")
    result, seen = run(bigram, data, config, tmp_path / "adapter")
    assert seen.starts[0].plan == result.plan == "whole forward pass"
    assert result.final_loss < 0.6 * seen.steps[0].loss
    again, _ = run(bigram, data, config, tmp_path / "again")
    first, second = ((each.path / "adapter_model.safetensors").read_bytes() for each in (result, again))
    assert first == second
    other, _ = run(bigram, data, replace(config, seed=1), tmp_path / "other")
    assert (other.path / "adapter_model.safetensors").read_bytes() != first


@pytest.fixture
def opened(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """The graphs that are opened, from a bundle's folder."""
    seen: list[str] = []
    from edgetune.runtimes import onnx_session
    from edgetune.runtimes.layered import optimizer
    from edgetune.runtimes.layered.onnxruntime import backend as onnxruntime
    from edgetune.runtimes.whole import session as portable

    def open_graph(model: Path, weights_folder: Path | None = None) -> Any:
        seen.append(model.name)
        return onnx_session.open_graph(model, weights_folder)

    for module in (portable, onnxruntime, optimizer):
        monkeypatch.setattr(module, "open_graph", open_graph)
    if find_spec("openvino"):
        openvino_core.core()
        from edgetune.runtimes.layered.openvino import backend as openvino

        load = openvino.OpenVinoBackend.load

        def load_and_note(self: Any, graph: Path) -> Any:
            seen.append(graph.name)
            return load(self, graph)

        monkeypatch.setattr(openvino.OpenVinoBackend, "load", load_and_note)
    yield seen


@pytest.mark.parametrize(
    ("runtime", "plan", "graphs"),
    [
        ("onnxruntime", "whole", {"loss.onnx"}),
        ("onnxruntime", "auto", {"attention.onnx", "mlp.onnx", "head.onnx", "dequantise.onnx"}),
        ("onnxruntime", "stream", {"attention.onnx", "mlp.onnx", "head.onnx", "dequantise.onnx"}),
        pytest.param("openvino", "stream", {"attention.onnx", "mlp.onnx", "head.onnx"}, marks=needs_openvino),
    ],
)
def test_a_run_opens_forward_graphs_alone(
    runtime: Any, plan: PlanName, graphs: set[str], opened: list[str], tmp_path: Path
) -> None:
    config = replace(FORWARD_ONLY, runtime=runtime, plan=plan, steps=12, learning_rate=2e-2, schedule="constant")
    result = train(
        GOLDEN / "bundle",
        GOLDEN / "train.jsonl",
        tmp_path / "adapter",
        config,
        valid=GOLDEN / "valid.jsonl",
        observer=Recorder(),
    )
    assert set(opened) == graphs
    assert (result.runtime, "forward" in result.plan) == (runtime, True)
    assert result.last_validation_loss is not None
    assert result.first_validation_loss is not None
    assert result.last_validation_loss < result.first_validation_loss - 0.01
    assert len(metrics(result.path)) == 12


@pytest.mark.parametrize(
    ("runtime", "graphs"),
    [
        ("onnxruntime", []),
        pytest.param("openvino", ["loss 4x64"], marks=needs_openvino),
        pytest.param("qnn", ["loss_half 4x64"], marks=needs_qnn),
    ],
)
def test_a_run_says_where_its_forward_graphs_run(runtime: Any, graphs: list[str], tmp_path: Path) -> None:
    buckets = None if runtime == "onnxruntime" else "4x64"
    config = replace(FORWARD_ONLY, runtime=runtime, plan="whole", steps=1, queries=2, buckets=buckets)
    bundle = copy_of_bundle(GOLDEN / "bundle", tmp_path / "bundle")
    recorder = Recorder()
    result = train(bundle, GOLDEN / "train.jsonl", tmp_path / "adapter", config, observer=recorder)
    assert [f"{each['graph']} {each['batch']}x{each['length']}" for each in result.placement] == graphs
    assert [notice.partition(":")[0] for notice in recorder.notices] == graphs


PLANS = {
    "whole": WholePlan(),
    "resident": LayeredPlan(resident=True),
    "streamed": LayeredPlan(resident=False, head_rows=16, head_tokens=100),
}


@pytest.mark.own
@pytest.mark.parametrize("name", PLANS)
@pytest.mark.parametrize("runtime", ["onnxruntime", pytest.param("openvino", marks=needs_openvino)])
@pytest.mark.parametrize("variant", ["grouped-query", "partial"])
def test_a_forward_pass_has_the_loss_of_a_session_with_the_same_parameters(
    prepared: Prepared, variant: str, runtime: str, name: str
) -> None:
    if (runtime, name) == ("openvino", "whole"):
        pytest.skip("openvino computes the whole step in bfloat16: test_openvino.py")
    bundle = prepared(variant, "int4")
    wanted, batch = adapter_of(bundle), batch_of(bundle, rows_of(1, [20, 9]))
    others = {name: 0 * value for name, value in wanted.items()}
    optimizer = OptimizerConfig(0.0, 0.0)
    with find_runtime("onnxruntime").open_session(bundle, wanted, optimizer, WholePlan()) as session:
        loss = session.evaluate(batch)
    found = find_runtime(runtime)
    plan = replace(PLANS[name], forward_only=True)
    if runtime == "openvino":
        exact = found.abilities().exact
        assert exact is not None
        plan = replace(plan, precision=exact.precision)
    with found.open_forward(bundle, others, plan) as forward:
        base = forward.evaluate(batch)
        for parameter, values in wanted.items():
            forward.set_parameter(parameter, values)
        tolerance = 2e-3 if runtime == "openvino" else 1e-5
        assert forward.evaluate(batch) == pytest.approx(loss, rel=tolerance)
        assert abs(base - loss) > 2 * tolerance * loss, "an adapter that changes nothing shows nothing"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"plan": "keep"}, "--plan keep says what a backward pass needs"),
        ({"runtime": "ort-training"}, "--runtime ort-training has no --method forward-only"),
        ({"queries": 1}, "queries is 1, expected 2 to"),
        ({"perturbation_size": 0.0}, "perturbation_size is 0.0, expected 1e-09 to"),
    ],
)
def test_what_cannot_be_meant_is_refused(change: dict[str, Any], message: str, tmp_path: Path) -> None:
    config = replace(FORWARD_ONLY, **change)
    with pytest.raises(UsageError, match=message):
        train(GOLDEN / "bundle", GOLDEN / "train.jsonl", tmp_path / "adapter", config, observer=Recorder())
