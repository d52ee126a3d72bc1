"""In how many passes a step goes through the model: as few as memory allows, and the same step in any number."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from prepared_bundles import Prepared
from safetensors.numpy import load_file

from edgetune.bundle import Bundle
from edgetune.config import Method, TrainConfig
from edgetune.data.encode import Example
from edgetune.errors import ResourceError
from edgetune.train import train
from edgetune.train.fitting import Fit, Fitting
from edgetune.train.observer import StartInfo, StepMetrics

BATCH = 8


class Starts:
    """Notes how a run begins, its losses and gradients' norms."""

    def __init__(self) -> None:
        self.start: list[StartInfo] = []
        self.losses: list[float] = []
        self.norms: list[float] = []

    def on_start(self, info: StartInfo) -> None:
        self.start.append(info)

    def on_step(self, metrics: StepMetrics) -> None:
        self.losses.append(metrics.loss)
        self.norms.append(metrics.grad_norm)

    def on_validation(self, step: int, loss: float) -> None:
        self.losses.append(loss)

    def on_notice(self, text: str) -> None:
        pass


@pytest.fixture
def bundle(prepared: Prepared) -> Bundle:
    return prepared("grouped-query", "int4")


def rows(count: int, length: int) -> list[Example]:
    return [Example(line, ids, ids) for line in range(1, count + 1) for ids in [list(range(length))]]


def fit(bundle: Bundle, budget: int | None, method: Method = "backpropagation", batch_size: int = BATCH) -> Fit:
    text = None if budget is None else f"{budget}B"
    config = TrainConfig(
        "onnxruntime", memory_budget=text, batch_size=batch_size, method=method, packing=False, epochs=1
    )
    return Fitting(bundle, rows(BATCH, 96), [], None, here=True).fit(config, lambda text: None)


def peak(fit: Fit) -> int:
    found = fit.choice.predicted_peak_bytes
    assert found is not None
    return found


@pytest.mark.parametrize("method", ["backpropagation", "forward-only"])
def test_a_batch_is_divided_before_anything_is_computed_twice(bundle: Bundle, method: Method) -> None:
    layers = bundle.manifest.architecture.num_hidden_layers
    unlimited = fit(bundle, None, method)
    assert unlimited.workload.pass_rows == BATCH and unlimited.choice.plan.repeats_nothing(layers)
    single = fit(bundle, None, method, batch_size=1)
    assert peak(single) < peak(unlimited)
    divided = []
    for share in (0.25, 0.5, 0.75):
        budget = int(1.05 * (peak(single) + share * (peak(unlimited) - peak(single)))) + 1
        found = fit(bundle, budget, method)
        assert 1.05 * peak(found) <= budget
        divided.append(found.workload.pass_rows)
        assert found.choice.plan.repeats_nothing(layers), found.choice.plan
        shapes = [(shape.sequences, shape.length) for step in found.workload.step_shapes() for shape in step]
        assert set(shapes) == {(found.workload.pass_rows, 96)} and len(shapes) == BATCH // divided[-1]
    assert divided == sorted(divided) and 1 <= divided[0] < BATCH


def test_what_no_division_makes_fit_is_refused_with_what_would(bundle: Bundle) -> None:
    with pytest.raises(ResourceError, match=r"the smallest plan .* needs --memory-budget (\d+)MB") as refused:
        fit(bundle, 10**6)
    advice = needed(refused.value)
    assert fit(bundle, advice).workload.pass_rows == 1
    with pytest.raises(ResourceError):
        fit(bundle, advice - 10**6)


def needed(refused: ResourceError) -> int:
    """The budget that the message advises, in bytes."""
    return int(str(refused).split("--memory-budget ")[1].split("MB")[0]) * 10**6


def test_a_step_is_the_same_in_any_number_of_passes(bundle: Bundle, tmp_path: Path) -> None:
    """Rows of different lengths, packed; validation as well."""
    data = tmp_path / "rows.jsonl"
    words = ["lamp", "on", "off", "the", "in", "kitchen"]
    counts = (4, 20, 8, 16, 30, 4, 12, 25, 6, 22, 15, 10)
    lines = [{"prompt": "set", "completion": " ".join(words[i % 6] for i in range(count))} for count in counts]
    data.write_text("".join(json.dumps(line) + "\n" for line in lines))
    config = TrainConfig("onnxruntime", batch_size=8, steps=4, learning_rate=1e-2, schedule="constant")

    def run(name: str, budget: str | None) -> Starts:
        observer = Starts()
        train(bundle.path, data, data, tmp_path / name, replace(config, memory_budget=budget), observer)
        return observer

    whole = run("whole", None)
    with pytest.raises(ResourceError) as refused:
        run("divided", "1MB")
    divided = run("divided", f"{needed(refused.value)}B")
    assert divided.start[0].pass_rows < whole.start[0].pass_rows == 8
    assert len(whole.losses) == len(divided.losses) == 7
    np.testing.assert_allclose(divided.losses, whole.losses, rtol=1e-5)
    np.testing.assert_allclose(divided.norms, whole.norms, rtol=1e-4)
    left, right = (load_file(tmp_path / name / "adapter_model.safetensors") for name in ("divided", "whole"))
    assert left.keys() == right.keys()
    for name, values in right.items():
        # A hundredth of a step: AdamW's first steps are of one length, however small a gradient and its rounding are.
        np.testing.assert_allclose(left[name], values, rtol=0, atol=1e-4, err_msg=name)
    provenance = json.loads((tmp_path / "divided" / "edgetune.json").read_text())["provenance"]
    assert int(provenance["pass_rows"]) == divided.start[0].pass_rows
    assert json.loads(provenance["options"])["batch_size"] == 8
