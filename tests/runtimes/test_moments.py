"""AdamW with moments in 8 bits, against an implementation of the paper in PyTorch and against float32 moments."""

from __future__ import annotations

import math
import tracemalloc
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from importlib.util import find_spec
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from edgetune.formats.bundle import load_bundle
from edgetune.planning.memory import Sizes, Work, peak_memory
from edgetune.runtimes import find_runtime
from edgetune.runtimes.contract import OptimizerConfig
from edgetune.runtimes.execution import LayeredPlan
from edgetune.runtimes.layered.moments import STRETCH
from edgetune.runtimes.layered.optimizer import FlatAdamW
from support.golden import BUNDLE
from support.oracle import relative
from support.prepared_bundles import Prepared
from support.random_rows import lengths_of, rows_of
from support.tiny_step import LEARNING_RATE, adapter_of, batch_of

Array = NDArray[np.float32]
GRAPH = BUNDLE / "layers" / "adamw_flat.onnx"
SHAPES = {"0.lora_A.weight": (4, 150), "0.lora_B.weight": (700, 4), "0.lora_magnitude_vector": (300,)}
CONFIG = OptimizerConfig(weight_decay=0.1, max_grad_norm=1.0)
STEPS = 20
BLOCK = 256
KEEP = LayeredPlan(kept_layers=2, resident=True, head_rows=1024)
SOME = replace(KEEP, kept_layers=1, layers=range(1, 2))


def gradients(step: int) -> dict[str, Array]:
    """Each parameter's of its own size, and numbers within one of very different ones; some are zero at first."""
    generator = np.random.default_rng(step)
    found = {}
    for index, (name, shape) in enumerate(SHAPES.items()):
        spread = 10.0 ** np.random.default_rng(7).uniform(-2, 0, shape)
        values = 10.0**-index * spread * (generator.standard_normal(shape) + 0.5)
        found[name] = (values * (step > 0 or index > 0)).astype(np.float32)
    return found


def first_parameters() -> dict[str, Array]:
    generator = np.random.default_rng(99)
    return {name: generator.standard_normal(shape).astype(np.float32) for name, shape in SHAPES.items()}


class TorchAdamW8bit:
    """Dettmers et al. 2022 for one tensor: algorithm 1's steps, each value looked for among all 256.

    But for one thing, which is ours: a second moment that is not zero is not rounded to zero.
    """

    def __init__(self, parameter: torch.Tensor, rate: float) -> None:
        self.parameter, self.rate, self.steps = parameter.double().flatten(), rate, 0
        blocks = math.ceil(self.parameter.numel() / BLOCK)
        self.states = [(torch.zeros(blocks, BLOCK, dtype=torch.int64), torch.zeros(blocks)) for _ in range(2)]
        # The map as linspaces of each decade, from the finest on.
        halves = []
        for signed in (True, False):
            values = [torch.tensor([0.0, 1.0])]
            for bits in range(7):
                edges = torch.linspace(0.1, 1, 2 ** (bits + (not signed)) + 1, dtype=torch.float64)
                decade = 10.0 ** (bits - 6) * (edges[:-1] + edges[1:]) / 2
                values += [decade, -decade] if signed else [decade]
            halves.append(torch.cat(values).float().sort().values)
        self.maps = halves

    def moments(self) -> list[torch.Tensor]:
        size = self.parameter.numel()
        pairs = zip(self.maps, self.states, strict=True)
        return [(values[codes] * scales[:, None]).flatten()[:size].double() for values, (codes, scales) in pairs]

    def step(self, gradient: torch.Tensor, learning_rate: float, decay: float) -> None:
        self.steps += 1
        rate, (first, second) = self.rate * learning_rate, self.moments()
        gradient = gradient.double().flatten()
        first = torch.lerp(first, gradient, 0.1)
        second = torch.lerp(second, gradient**2, 0.001)
        self.parameter *= 1 - rate * decay
        root = (second / (1 - 0.999**self.steps)).sqrt() + 1e-8
        self.parameter -= rate * first / (1 - 0.9**self.steps) / root
        self.states = [self.stored(moment, which) for which, moment in enumerate((first, second))]

    def stored(self, moment: torch.Tensor, which: int) -> tuple[torch.Tensor, torch.Tensor]:
        values = self.maps[which]
        padded = torch.zeros(self.states[which][0].numel())
        padded[: moment.numel()] = moment.float()
        blocks = padded.view(-1, BLOCK)
        scales = blocks.abs().amax(dim=1)
        shares = blocks / scales.clamp(min=1e-30)[:, None]
        distances = (shares[..., None] - values).abs()
        if which == 1:
            distances[..., 0] = torch.where(shares > 0, torch.inf, distances[..., 0])
        return distances.argmin(dim=-1), scales


@pytest.mark.parametrize("ratio", [1.0, 16.0], ids=["one rate", "two rates"])
def test_twenty_steps_are_the_papers(ratio: float) -> None:
    optimizer, exact = (
        FlatAdamW(GRAPH, first_parameters(), replace(CONFIG, lora_plus_ratio=ratio), eight_bit=eight_bit)
        for eight_bit in (True, False)
    )
    rates = {name: ratio if "lora_B" in name else 1.0 for name in SHAPES}
    expected = {
        name: TorchAdamW8bit(torch.from_numpy(value.copy()), rates[name]) for name, value in first_parameters().items()
    }
    clipped = 0
    for step in range(STEPS):
        given, rate = gradients(step), 1e-2 * (1 - step / STEPS)
        norm = math.sqrt(sum(float(np.square(value, dtype=np.float64).sum()) for value in given.values()))
        clipped += norm > 1
        for name, value in given.items():
            optimizer.gradient(name)[...] = exact.gradient(name)[...] = value
            expected[name].step(torch.from_numpy(value) * min(1, 1 / (norm + 1e-6)), rate, CONFIG.weight_decay)
        assert optimizer.step(rate, 1.0) == (pytest.approx(norm, rel=1e-5), True)
        exact.step(rate, 1.0)
    assert clipped > 0
    for name, first in first_parameters().items():
        moved = optimizer.parameter(name) - first
        oracle = expected[name].parameter.numpy().reshape(first.shape) - first
        # A rounding that goes to the other of two values as near is all that there is.
        assert relative(moved, oracle) <= 1e-4, name
        assert 5e-3 <= relative(moved, exact.parameter(name) - first) <= 5e-2, name


def test_state_is_a_quarter_and_planned_as_it_is() -> None:
    """Bytes that numpy really takes, of a vector of several stretches."""
    shapes = {"0.lora_A.weight": (16, STRETCH // 2), "0.lora_B.weight": (STRETCH, 8)}
    size = sum(math.prod(shape) for shape in shapes.values())
    taken, states = {}, {}
    FlatAdamW(GRAPH, first_parameters(), CONFIG)  # what is imported counts for neither
    for eight_bit in (True, False):
        parameters = {name: np.zeros(shape, np.float32) for name, shape in shapes.items()}
        with measured() as bytes_held:
            optimizer = FlatAdamW(GRAPH, parameters, CONFIG, eight_bit=eight_bit)
            optimizer.step(1e-3, 1.0)
            taken[eight_bit] = bytes_held()
        states[eight_bit] = sum(array.nbytes for name, array in optimizer.state().items() if name.startswith("exp_avg"))
        del optimizer
    assert states == {False: 8 * size, True: pytest.approx(2.03125 * size)}
    manifest = load_bundle(BUNDLE).manifest
    footprint = find_runtime("onnxruntime").abilities().exact
    assert footprint is not None
    sizes, work = Sizes(manifest, KEEP), Work(32, 1024)
    sizes.adapter = size
    planned = {e: peak_memory(sizes, footprint, work, replace(KEEP, eight_bit_states=e)) for e in (True, False)}
    assert planned[False] - planned[True] == pytest.approx(taken[False] - taken[True], rel=0.05)
    assert planned[False] - planned[True] == pytest.approx(5.96875 * size - 8 * STRETCH, abs=2)


@contextmanager
def measured() -> Iterator[Any]:
    tracemalloc.start()
    before = tracemalloc.get_traced_memory()[0]
    try:
        yield lambda: tracemalloc.get_traced_memory()[0] - before
    finally:
        tracemalloc.stop()


def test_a_number_beside_a_much_larger_one_makes_no_leap() -> None:
    """Its second moment is far below the block's smallest value: over zero, its first would be thousands of steps."""
    gradient, rate = np.zeros((1, BLOCK), np.float32), 1e-3
    optimizer = FlatAdamW(GRAPH, {"a": gradient}, OptimizerConfig(0.0, 0.0), eight_bit=True)
    for step in range(10):
        gradient[0, 0], gradient[0, 1] = 1.0, 1e-4 if step == 0 else 0.0
        optimizer.gradient("a")[...] = gradient
        optimizer.step(rate, 1.0)
        assert np.abs(optimizer.parameter("a")).max() <= 1.01 * rate * (step + 1)


def test_a_parameter_is_not_rounded_with_its_neighbour() -> None:
    """Moments of gradients a million times as small are as exact as they are alone."""
    generator = np.random.default_rng(3)
    small, large = generator.standard_normal((2, 5, 30)).astype(np.float32) * np.float32([[[1e-6]], [[1]]])
    zeros = np.zeros_like(small)
    learnt = []
    for gradients_of in ({"a": small}, {"b": large, "a": small, "c": large}):
        optimizer = FlatAdamW(GRAPH, dict.fromkeys(gradients_of, zeros), OptimizerConfig(0.0, 0.0), eight_bit=True)
        for _ in range(5):
            for name, value in gradients_of.items():
                optimizer.gradient(name)[...] = value
            optimizer.step(1e-3, 1.0)
        learnt.append(optimizer.parameter("a").copy())
    np.testing.assert_array_equal(*learnt)


@pytest.mark.own
def test_what_takes_over_a_state_goes_on_the_same() -> None:
    def optimizer() -> FlatAdamW:
        return FlatAdamW(GRAPH, first_parameters(), replace(CONFIG, lora_plus_ratio=4.0), eight_bit=True)

    def run(each: FlatAdamW, steps: range) -> Mapping[str, NDArray[Any]]:
        for step in steps:
            for name, value in gradients(step).items():
                each.gradient(name)[...] = value
            each.step(1e-2, 1.0)
        return {name: array.copy() for name, array in each.state().items()}

    expected, other = run(optimizer(), range(8)), optimizer()
    other.restore(run(optimizer(), range(5)))
    found = run(other, range(5, 8))
    kinds = {f"{moment}.{kind}" for moment in ("exp_avg", "exp_avg_sq") for kind in ("codes", "scales")}
    assert set(found) == {"parameter", "steps", *kinds}
    for name, array in expected.items():
        assert array.tobytes() == found[name].tobytes(), name


@pytest.mark.own
@pytest.mark.parametrize(
    ("kind", "plan", "runtime"),
    [("lora", KEEP, "onnxruntime"), ("dora", KEEP, "onnxruntime"), ("dora", SOME, "openvino")],
    ids=["lora", "dora", "dora in a layer"],
)
def test_losses_are_near_those_of_float32_moments(
    prepared: Prepared, with_dora: Prepared, kind: str, plan: LayeredPlan, runtime: str
) -> None:
    bundle = (with_dora if kind == "dora" else prepared)("grouped-query", "int4")
    if find_spec(runtime) is None:
        pytest.skip(f"{runtime} is not installed")
    exact = find_runtime(runtime).abilities().exact
    assert exact is not None
    parameters = {name: adapter_of(bundle)[name] for name in plan.trained_slots(bundle.manifest.lora).shapes()}
    batches = [batch_of(bundle, rows_of(seed, lengths_of("grouped-query", seed))) for seed in range(2)]
    losses = []
    for eight_bit in (False, True):
        given = replace(plan, precision=exact.precision, eight_bit_states=eight_bit)
        with find_runtime(runtime).open_session(bundle, parameters, OptimizerConfig(0.01, 1.0), given) as session:
            losses.append([session.step(batches, LEARNING_RATE).loss for _ in range(STEPS)])
    assert losses[0] != losses[1]
    fallen = losses[0][0] - losses[0][-1]
    assert fallen > 0
    np.testing.assert_allclose(losses[1], losses[0], rtol=0, atol=0.01 * fallen)
