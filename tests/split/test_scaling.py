"""Factors around the trunk's products: nothing changes in float, and massive activations survive int8."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest

from edgetune.config import Base
from edgetune.errors import IncompatibleError
from edgetune.formats.bundle import Bundle
from edgetune.formats.frozen_weights import FrozenWeights
from edgetune.runtimes.execution import LayeredPlan, TrunkUse
from edgetune.runtimes.layered.lower_layers import QuantisedLayers, Trunk, TrunkLayers
from edgetune.runtimes.layered.onnxruntime.backend import OrtBackend
from edgetune.runtimes.layered.session import LayeredSession
from edgetune.runtimes.onnx_session import open_graph
from edgetune.split.graph import TrunkGraph, build_trunk
from edgetune.split.quantise import Feed
from edgetune.split.scaling import even_channels, even_positions, largest_results
from support.massive_activations import prepare_massive
from support.oracle import relative
from support.prepared_bundles import InPieces, Prepared
from support.split_runs import FloatLayers, encoded_rows, split_in_the_middle, write_split_rows
from support.tiny_step import OPTIMIZER, adapter_of, batch_of


def feed_of(bundle: Bundle, seed: int, positions: int = 12) -> Feed:
    """A row of random states, of which one is massive and one is zero."""
    a, generator = bundle.manifest.architecture, np.random.default_rng(seed)
    hidden = generator.standard_normal((1, positions, a.hidden_size)).astype(np.float32)
    hidden[0, 0, 3], hidden[0, -1] = 24_890, 0
    table = np.zeros((1, positions, a.rope.dim), np.float32)
    visible = np.tri(positions, dtype=bool)
    bias = np.where(visible, 0, -1e4).astype(np.float32)[None, None]
    return {"hidden": hidden, "attn_bias": bias, "rope_cos": table + 1, "rope_sin": table}


def states_of(trunk: TrunkGraph, feed: Feed) -> np.ndarray:
    session = open_graph(ir.to_proto(trunk.model).SerializeToString())
    states: np.ndarray = session.run(["output"], dict(feed))[0]
    return states


def compare_evened(bundle: Bundle) -> None:
    feeds = [feed_of(bundle, seed) for seed in range(3)]
    exact = [states_of(build_trunk(bundle, 1), feed) for feed in feeds]
    trunk = build_trunk(bundle, 1)
    even_positions(trunk)
    results = largest_results(trunk, feeds[:2])
    even_channels(trunk, results)
    for feed, expected in zip(feeds, exact, strict=True):
        found = states_of(trunk, feed)
        for position in range(expected.shape[1] - 1):
            assert relative(found[0, position], expected[0, position]) < 1e-5
        assert np.isfinite(found).all(), "a position of zeros was divided by zero"
    factors = [value for value in trunk.model.graph.initializers.values() if str(value.name).endswith(".channels")]
    assert len(factors) == len(trunk.modules)
    for value in factors:
        assert value.const_value is not None
        exponents = np.log2(value.const_value.numpy())
        np.testing.assert_array_equal(exponents, np.rint(exponents))
    assert max(len(np.unique(value.const_value.numpy())) for value in factors if value.const_value is not None) > 1
    assert results.keys() == trunk.modules.keys()


@pytest.mark.parametrize(("variant", "base"), [("grouped-query", "int4"), ("partial", "fp32")])
def test_in_float_nothing_changes(prepared: Prepared, variant: str, base: Base) -> None:
    compare_evened(prepared(variant, base))


def test_in_float_nothing_changes_in_pieces(in_pieces: InPieces) -> None:
    compare_evened(in_pieces("grouped-query"))


@pytest.mark.parametrize("largest", [24_890, 60_000, 1e8, 1e20])
def test_massive_activations_are_right_or_refused(largest: float, tmp_path: Path) -> None:
    """The other positions as well as the massive one, and the loss above; int8 with one scale had an error of 1.1."""
    massive = prepare_massive(tmp_path, largest)
    data = write_split_rows(tmp_path)
    try:
        halves = split_in_the_middle(massive, data, tmp_path / "split")
    except IncompatibleError as error:
        assert largest > 1e8
        assert "are not finite" in str(error)
        assert not (tmp_path / "split").exists()
        return
    batch = batch_of(halves, encoded_rows(halves, data))
    exact, found = (states_above(halves, layers) for layers in (FloatLayers(massive, 2), QuantisedLayers(halves)))
    expected, states = exact.hidden(batch).astype(np.float64), found.hidden(batch)
    assert np.abs(expected).max() > largest / 2
    real = batch.rows >= 0
    errors = np.linalg.norm(states - expected, axis=-1)[real] / np.linalg.norm(expected, axis=-1)[real]
    assert errors.mean() < 0.25
    assert errors.max() < 0.5
    plan = LayeredPlan(kept_layers=2, trunk=TrunkUse(layers=2))
    above = ("model.layers.2", "model.layers.3")
    adapter = {name: value for name, value in adapter_of(halves).items() if name.startswith(above)}
    loss, of_float = (
        LayeredSession(halves, adapter, OPTIMIZER, plan, OrtBackend(halves, "fp32"), trunk).evaluate(batch)
        for trunk in (found, exact)
    )
    assert loss == pytest.approx(of_float, rel=0.05)


def states_above(bundle: Bundle, layers: TrunkLayers) -> Trunk:
    return Trunk(FrozenWeights(bundle.path, bundle.manifest.architecture), layers)
