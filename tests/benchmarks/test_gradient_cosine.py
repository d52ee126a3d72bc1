"""The benchmark of forward-only's gradient compares it with the exact one, in every runtime that runs both ways."""

from __future__ import annotations

import math
import re
import subprocess
import sys
from importlib.util import find_spec

import numpy as np
import onnxruntime as ort
import pytest
from click.testing import CliRunner

from benchmarks.edgetune_worker import cosine, fit, gradients_at
from benchmarks.experiments import Edgetune
from benchmarks.gradient_cosine import expected_cosine, main, measure_estimate
from edgetune.data.encode import load_encoder
from edgetune.data.examples import load_examples
from edgetune.formats.bundle import load_bundle
from edgetune.model.lora import initial_parameters
from edgetune.runtimes.forward_only import QueryConfig
from support.golden import BUNDLE, TRAIN
from support.repository import ROOT

STOCK = Edgetune("onnxruntime")


def test_the_expected_cosine_is_that_of_random_directions() -> None:
    """Of the estimate that any gradient gets: its projections on random signs, each less the mean of the others."""
    queries, dimension = 12, 50
    generator = np.random.default_rng(3)
    exact = generator.normal(size=dimension)
    squares = []
    for _ in range(2_000):
        directions = generator.choice([-1.0, 1.0], size=(queries, dimension))
        slopes = directions @ exact
        squares.append(cosine((slopes - slopes.mean()) @ directions, exact) ** 2)
    assert expected_cosine(queries, dimension) == pytest.approx(math.sqrt(np.mean(squares)), rel=0.05)


@pytest.mark.parametrize(
    "runtime",
    [
        "onnxruntime",
        pytest.param(
            "openvino", marks=pytest.mark.skipif(find_spec("openvino") is None, reason="openvino is not installed")
        ),
    ],
)
def test_the_cosine_on_the_golden_bundle_is_what_theory_expects(runtime: str) -> None:
    found = measure_estimate(Edgetune(runtime), BUNDLE, TRAIN, 4, QueryConfig(400, 1e-2, seed=1))
    lora = load_bundle(BUNDLE).manifest.lora
    assert found.parameters == lora.rank * sum(slot.out_features for slot in lora.slots)
    # Far above what chance would give.
    assert found.expected == expected_cosine(400, found.parameters) > 19 * found.noise
    assert abs(found.measured - found.expected) < 4 * found.noise


def test_where_b_is_zero_the_exact_gradient_is_the_graphs_own() -> None:
    """Where training starts; read off a step, up to a factor."""
    bundle = load_bundle(BUNDLE)
    manifest = bundle.manifest
    rows = load_examples(TRAIN, load_encoder(bundle.path, manifest.tokenizer), manifest.max_length, truncate=False)
    fitted = fit(STOCK, bundle, rows.examples[:4], 4, packing=True)
    [batch] = next(fitted.workload.steps())
    parameters = initial_parameters(manifest.lora, seed=0)
    found = gradients_at(parameters, fitted.choice, bundle, [batch])
    step = ort.InferenceSession(bundle.file("step"), providers=["CPUExecutionProvider"])
    feed = {**batch.tensors(), **parameters, "loss_scale": np.ones(1, np.float32)}
    for name, values in found.items():
        [exact] = step.run([f"{name}.grad"], feed)
        if "lora_B" in name:
            assert cosine(values, exact.astype(np.float64)) == pytest.approx(1, abs=1e-5)
        else:
            assert not exact.any() and not values.any()


def test_the_command_prints_it_in_a_line() -> None:
    command = [sys.executable, "-m", "benchmarks.gradient_cosine", BUNDLE, "--data", TRAIN, "--queries", 2]
    printed = subprocess.run(map(str, command), cwd=ROOT, capture_output=True, text=True, check=True).stdout
    assert re.fullmatch(
        r"gradient cosine of a forward-only step with the exact gradient: -?0\.\d{4} "
        r"\(expected 0\.0147 ± 0\.0147 for 4,608 parameters\)\n",
        printed,
    )


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([BUNDLE, "--runtime", "abacus"], "runtime is 'abacus', expected one of auto"),
        ([BUNDLE, "--runtime", "ort-training"], "--runtime ort-training has no --method forward-only"),
        ([BUNDLE.parent], "no bundle here"),
        ([BUNDLE, "--queries", "1"], "1 is not in the range x>=2"),
    ],
)
def test_what_cannot_be_measured_is_refused(arguments: list[object], message: str) -> None:
    refused = CliRunner().invoke(main, [*map(str, arguments), "--data", str(TRAIN)])
    assert refused.exit_code != 0
    assert message in refused.output
