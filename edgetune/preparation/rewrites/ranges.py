"""What numbers a step computes on rows: ranges for fixed-point accelerators, and what float16 does not hold."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from edgetune.config import Base
from edgetune.data.batches import Batch, make_batch
from edgetune.data.encode import Example
from edgetune.model.architecture import Architecture
from edgetune.model.lora import Lora, initial_parameters
from edgetune.preparation.rewrites.frozen_weights import attach_weights, cancel_transposes
from edgetune.preparation.rewrites.int8_products import frozen_product
from edgetune.preparation.rewrites.operators import Operators
from edgetune.runtimes.onnx_session import open_graph
from edgetune.runtimes.whole.loss_scale import LossScale

_BATCHES, _ROWS, _LENGTH = 4, 2, 64
"""Number of synthetic batches, rows in each, and tokens in each row."""
_ADAPTER = 0.02
"""Standard deviation of the B matrices in every second batch: the ranges have to hold for trained adapters, too."""
_SMALLEST_ROW = 2.0**-14
"""float16's smallest normal number: no row is taken for smaller."""
Range = tuple[float, float]


def row_factors(op: Operators, x: ir.Value) -> tuple[ir.Value, ir.Value]:
    """1 / √m and √m of every row's largest magnitude m, each (…, 1).

    A row times the first twice lies in [-1, 1]. Twice, because 1 / m has no normal float16 where m is above 16,384.
    """
    largest = op.op("ReduceMax", [op.op("Abs", [x]), op.integers(-1)], attributes={"keepdims": 1})
    root = op.op("Sqrt", [op.op("Max", [largest, op.floats(_SMALLEST_ROW)])])
    return op.op("Reciprocal", [root]), root


def synthetic_rows(architecture: Architecture, max_length: int) -> list[Example]:
    """Rows of random tokens, for want of real ones."""
    generator = np.random.default_rng(0)
    length = min(_LENGTH, max_length)
    return [
        Example(line, ids, [-100, *ids[1:]])
        for line in range(_BATCHES * _ROWS)
        for ids in [generator.integers(0, architecture.vocab_size, length).tolist()]
    ]


def calibrate(
    step: ir.Model,
    folder: Path,
    architecture: Architecture,
    base: Base,
    lora: Lora,
    rows: Sequence[Example],
) -> dict[str, Range]:
    """Measure ranges by running the step on the CPU.

    Gradients are multiplied by the largest factor that `LossScale` may choose.

    Args:
        step: The lowered step graph whose frozen weights are inputs; it is left as it is.
        folder: Holds the GenAI model.
        architecture: Sizes of the model.
        base: How the GenAI model stores linear layers.
        lora: The slots.
        rows: The rows to run.

    Returns:
        The range of each result of a product with a frozen weight, as it is where the rows of the other factor are
        divided by their largest magnitudes; by the name of the result.
    """
    model = ir.from_proto(ir.to_proto(step))
    names = _observe(model)
    session = _opened(model, folder, architecture, base)
    found: dict[str, Range] = {}
    for number, batch in enumerate(_batches(rows, architecture)):
        feed = _feed(batch, lora, number)
        outputs = [f"{name}.{bound}" for name in names for bound in ("least", "largest")]
        values = iter(session.run(outputs, feed))
        for name in names:
            least, largest = float(next(values)), float(next(values))
            before = found.get(name, (least, largest))
            found[name] = min(before[0], least), max(before[1], largest)
    return found


def largest_magnitudes(
    step: ir.Model,
    folder: Path,
    architecture: Architecture,
    base: Base,
    lora: Lora,
    rows: Sequence[Example],
) -> dict[str, float]:
    """The largest magnitude of every tensor that a step computes, forward and backward, by its name in the graph.

    Args:
        step: The lowered step graph whose frozen weights are inputs; it is left as it is.
        folder: Holds the GenAI model.
        architecture: Sizes of the model.
        base: How the GenAI model stores linear layers.
        lora: The slots.
        rows: Of these some are run, at regular intervals.
    """
    model = ir.from_proto(ir.to_proto(step))
    values = [value for node in model.graph for value in node.outputs if value.dtype == ir.DataType.FLOAT]
    op = Operators()
    names = [str(value.name) for value in values]
    largest = [("ReduceMax", op.op("Abs", [value])) for value in values]
    _give_bounds(model, op, dict(zip((f"{name}.largest" for name in names), largest, strict=True)))
    session = _opened(model, folder, architecture, base)
    found = dict.fromkeys(names, 0.0)
    few = rows[:: -(-len(rows) // (_BATCHES * _ROWS))]
    for number, batch in enumerate(_batches(few, architecture)):
        feed = {**_feed(batch, lora, number), "loss_scale": np.ones(1, np.float32)}
        for name, reached in zip(names, session.run(None, feed), strict=True):
            # What is no number stays.
            found[name] = float(np.maximum(found[name], reached))
    return found


def _opened(model: ir.Model, folder: Path, architecture: Architecture, base: Base) -> Any:
    """A session of a graph whose frozen weights are inputs, with the weights of a GenAI model."""
    attach_weights(model, folder, architecture, base)
    return open_graph(ir.to_proto(model).SerializeToString(), folder)


def _give_bounds(model: ir.Model, op: Operators, bounds: Mapping[str, tuple[str, ir.Value]]) -> None:
    """Make numbers the only outputs: by their names the reduction of a tensor that gives each."""
    model.graph.outputs.clear()
    for name, (reduction, value) in bounds.items():
        result = op.op(reduction, [value], attributes={"keepdims": 0})
        result.name, result.dtype, result.shape = name, ir.DataType.FLOAT, ir.Shape([])
        model.graph.outputs.append(result)
    for number, node in enumerate(op.nodes):
        node.name = f"calibration/{number}"
    model.graph.extend(op.nodes)


def _observe(model: ir.Model) -> list[str]:
    """Make the bounds of every product of divided rows the only outputs; returns the names of the results."""
    cancel_transposes(model.graph)
    op = Operators()
    values: dict[str, ir.Value] = {}
    for node in model.graph:
        if (product := frozen_product(node)) is not None:
            shrink, _ = row_factors(op, product[0])
            (result,) = node.outputs
            values[str(result.name)] = op.op("Mul", [op.op("Mul", [result, shrink]), shrink])
    reductions = {"least": "ReduceMin", "largest": "ReduceMax"}
    bounds = {
        f"{name}.{bound}": (operator, value) for name, value in values.items() for bound, operator in reductions.items()
    }
    _give_bounds(model, op, bounds)
    return list(values)


def _batches(rows: Sequence[Example], architecture: Architecture) -> Iterator[Batch]:
    for start in range(0, len(rows), _ROWS):
        yield make_batch(rows[start : start + _ROWS], architecture.rope, 0, sliding_window=architecture.sliding_window)


def _feed(batch: Batch, lora: Lora, number: int) -> Mapping[str, NDArray[np.generic]]:
    generator = np.random.default_rng(number)
    parameters = initial_parameters(lora, seed=number)
    if number % 2:
        for slot in lora.slots:
            noise = _ADAPTER * generator.standard_normal(parameters[slot.b].shape)
            parameters[slot.b] = noise.astype(np.float32)
    # `of` rounds down to a power of two: twice as much is never exceeded.
    scale = np.array([2 * LossScale().of(batch.trained_tokens)], np.float32)
    return {**batch.tensors(), **parameters, "loss_scale": scale}
