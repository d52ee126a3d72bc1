"""In how many passes a step goes through the model: as few as memory allows, and the same step in any number."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file

from benchmarks.checkpoints import Size, make_checkpoint
from edgetune.config import Method, PrepareConfig, TrainConfig
from edgetune.data.batcher import BatchShape
from edgetune.data.encode import Example
from edgetune.errors import ResourceError
from edgetune.formats.bundle import Bundle
from edgetune.model.lora import layers_text
from edgetune.planning.cost import CostModel
from edgetune.planning.fit import Fit, Fitting, trained_layers
from edgetune.runtimes import onnxruntime
from edgetune.runtimes.execution import LayeredPlan
from edgetune.runtimes.layered.cached_states import record_bytes
from edgetune.training import train
from support.fake_runtime import FOOTPRINT, FakeRuntime, runtimes
from support.prepared_bundles import CONFIG, Prepared, prepare_checkpoint, prepare_tiny
from support.random_rows import rows_of
from support.recorder import Recorder
from support.run_requests import request_of
from support.tiny_step import LEARNING_RATE, OPTIMIZER, adapter_of, batch_of


@pytest.fixture
def bundle(prepared: Prepared) -> Bundle:
    return prepared("grouped-query", "int4")


def fit(bundle: Bundle, lengths: Sequence[int], budget: int | None, **options: Any) -> Fit:
    """Of a batch of rows that are not packed, in the order of the file."""
    given: dict[str, Any] = {"runtime": "onnxruntime", "batch_size": len(lengths), **options}
    config = TrainConfig(**given, memory_budget=f"{budget}B" if budget else None, packing=False, epochs=1)
    rows = [Example(line, [1] * length, [1] * length) for line, length in enumerate(lengths, 1)]
    return Fitting(bundle, rows, [], request_of(config)).fit()


def peak(fit: Fit) -> int:
    found = fit.choice.predicted_peak_bytes
    assert found is not None
    return found


def sequences(fit: Fit) -> list[int]:
    """Of each pass of a step."""
    return [shape.sequences for step in fit.workload.step_shapes for shape in step]


@pytest.mark.parametrize("method", ["backpropagation", "forward-only"])
@pytest.mark.parametrize("count", [8, 6])
def test_a_batch_is_divided_as_little_as_memory_allows(bundle: Bundle, count: int, method: Method) -> None:
    lengths = [96] * count
    whole, single = (fit(bundle, lengths, None, method=method, batch_size=size) for size in (count, 1))
    assert sequences(whole) == [count] and whole.workload.pass_rows == count
    found = []
    for share in (0.1, 0.25, 0.5, 0.75, 0.95):
        budget = int(1.05 * (peak(single) + share * (peak(whole) - peak(single)))) + 2
        divided = fit(bundle, lengths, budget, method=method)
        assert 1.05 * peak(divided) <= budget
        rows = divided.workload.pass_rows
        assert rows is not None and max(sequences(divided)) == rows < count and sum(sequences(divided)) == count
        # Nothing is computed or unpacked twice, as it would be if more rows went through at a time.
        assert replace(divided.choice.plan, head_rows=0) == replace(whole.choice.plan, head_rows=0)
        next_larger = {1: 2, 2: count // 2 if count == 6 else 4, 3: 6, 4: 8}[rows]
        assert 1.05 * peak(fit(bundle, [96] * next_larger, None, method=method)) > budget
        found.append(rows)
    assert found == sorted(found) and found[0] < found[-1]


def test_what_no_division_makes_fit_is_refused_with_what_would(bundle: Bundle) -> None:
    with pytest.raises(ResourceError, match=r"the smallest plan .* needs --memory-budget (\d+)MB") as refused:
        fit(bundle, [96] * 8, 10**6)
    assert "what would fit: nothing of this bundle" in str(refused.value)
    advice = needed(refused.value)
    assert fit(bundle, [96] * 8, advice).workload.pass_rows == 1
    with pytest.raises(ResourceError) as refused:
        fit(bundle, [96] * 8, advice - 10**6)
    found = re.search(r"what would fit: rows of at most (\d+) tokens \(fp32", str(refused.value))
    assert found is not None
    longest = int(found[1])
    assert fit(bundle, [longest] * 8, advice - 10**6).workload.pass_rows == 1
    with pytest.raises(ResourceError):
        fit(bundle, [longest + 1] * 8, advice - 10**6)


@pytest.mark.skipif(find_spec("openvino") is None, reason="needs OpenVINO")
def test_where_shapes_have_a_price_fewer_passes_can_be_the_smallest(bundle: Bundle) -> None:
    lengths = [32, 64, 96, 128]
    with pytest.raises(ResourceError) as refused:
        fit(bundle, lengths, 10**6, runtime="openvino")
    with pytest.raises(ResourceError) as in_four_shapes:
        fit(bundle, lengths, 10**6, runtime="openvino", batch_size=1)
    assert needed(refused.value) < needed(in_four_shapes.value)
    assert len(set(sequences(fit(bundle, lengths, needed(refused.value), runtime="openvino")))) == 1


def test_free_memory_divides_a_batch_as_a_budget_does(bundle: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    whole, single = (fit(bundle, [96] * 8, None, batch_size=size) for size in (8, 1))
    free = int((peak(whole) + peak(single)) / 2 / 0.85)
    monkeypatch.setattr("edgetune.planning.choice.free_memory_bytes", lambda: free)
    assert max(sequences(fit(bundle, [96] * 8, None))) < 8
    monkeypatch.setattr("edgetune.planning.choice.free_memory_bytes", lambda: 1_000_000)
    tried = fit(bundle, [96] * 8, None)
    assert not tried.choice.fits and tried.workload.pass_rows == 1
    assert any(note.endswith("it is tried") for note in tried.notes)


def test_the_fastest_runtime_divides_a_batch_before_a_slower_one_is_taken(bundle: Bundle) -> None:
    slower = replace(FOOTPRINT, base_bytes=FOOTPRINT.base_bytes - 5_000_000)
    with runtimes(openvino=FakeRuntime(), onnxruntime=FakeRuntime(exact=slower)):
        whole, single = (fit(bundle, [96] * 8, None, runtime="openvino", batch_size=size) for size in (8, 1))
        budget = int(1.05 * (peak(whole) + peak(single)) / 2)
        assert fit(bundle, [96] * 8, budget, runtime="onnxruntime").choice.name == "onnxruntime"
        found = fit(bundle, [96] * 8, budget, runtime="auto")
        assert found.choice.name == "openvino" and found.workload.pass_rows in (1, 2, 4)
        alone = fit(bundle, [96] * 8, int(1.05 * peak(single)) - 100_000, runtime="auto", plan="keep")
        assert alone.choice.name == "onnxruntime"


def test_the_work_of_passes_counts_what_each_of_them_repeats(bundle: Bundle) -> None:
    streamed = fit(bundle, [96] * 8, None, plan="stream")
    model = CostModel(bundle.manifest, streamed.choice.plan, streamed.choice.footprint)
    together, apart = ([BatchShape(8 // count, 96, 0, 0, 0)] * count for count in (1, 4))
    repeated = model.of_passes(apart) - model.of_passes(together)
    assert repeated == pytest.approx(3 * (model.start + model.work(0, 0, 0)), rel=1e-9)
    assert model.start > 0 and model.work(0, 0, 0) > 0


def needed(refused: ResourceError) -> int:
    """The budget that the message advises, in bytes."""
    return int(str(refused).split("--memory-budget ")[1].split("MB")[0]) * 10**6


def in_eight_bits(fit: Fit) -> bool:
    assert isinstance(fit.choice.plan, LayeredPlan)
    return fit.choice.plan.eight_bit_states


def with_rank(bundle: Bundle, rank: int) -> Bundle:
    """As if the slots had another rank: with 2,048, moments of 8 million parameters take 48 MB less in 8 bits."""
    return Bundle(bundle.path, replace(bundle.manifest, lora=replace(bundle.manifest.lora, rank=rank)))


def test_states_take_8_bits_only_where_nothing_fits_in_32(bundle: Bundle) -> None:
    large = with_rank(bundle, 2048)
    found = {states: fit(large, [96] * 8, None, optimizer_states=states) for states in ("auto", "32bit", "8bit")}
    assert [in_eight_bits(each) for each in found.values()] == [False, False, True]
    assert "8-bit optimizer states" in str(found["8bit"].choice.plan) and not found["8bit"].notes
    saved = 5.96875 * large.manifest.lora.parameters - 8 * 2**18
    assert peak(found["auto"]) - peak(found["8bit"]) == pytest.approx(saved, abs=2)
    with pytest.raises(ResourceError) as refused:
        fit(large, [96] * 8, 10**6, optimizer_states="32bit")
    least = needed(refused.value)
    # With room for the smallest plan in 32 bits, and no more, a step goes through the model in more passes.
    slow = fit(large, [96] * 8, least)
    assert not in_eight_bits(slow) and slow.workload.pass_rows == 1 and not slow.notes
    fast = fit(large, [96] * 8, least - 10**6)
    assert in_eight_bits(fast)
    (note,) = fast.notes
    assert re.fullmatch(r"the optimizer's states are kept in 8 bits: in 32 the smallest plan needs .* MB, and .*", note)
    assert 1.05 * peak(fast) <= least - 10**6
    with pytest.raises(ResourceError):
        fit(large, [96] * 8, least - 10**6, optimizer_states="32bit")


def test_what_8_bits_do_not_save_is_refused_with_what_they_need(bundle: Bundle) -> None:
    large = with_rank(bundle, 2048)
    refusals = {}
    for states in ("auto", "32bit", "8bit"):
        with pytest.raises(ResourceError) as refused:
            fit(large, [96] * 8, 10**6, optimizer_states=states)
        refusals[states] = needed(refused.value)
    assert refusals["auto"] == refusals["8bit"] < refusals["32bit"]
    assert in_eight_bits(fit(large, [96] * 8, refusals["auto"]))
    # Of a small adapter they save less than what a step takes to change it.
    for states in ("auto", "32bit", "8bit"):
        with pytest.raises(ResourceError) as refused:
            fit(bundle, [96] * 8, 10**6, optimizer_states=states)
        refusals[states] = needed(refused.value)
    assert refusals["auto"] == refusals["32bit"]


def test_where_not_even_8_bits_fit_what_is_free_they_are_tried(
    bundle: Bundle, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("edgetune.planning.choice.free_memory_bytes", lambda: 1_000_000)
    for rank, eight_bit in ((4, False), (2048, True)):
        tried = fit(with_rank(bundle, rank), [96] * 8, None)
        assert not tried.choice.fits and in_eight_bits(tried) == eight_bit
    forward_only = fit(with_rank(bundle, 2048), [96] * 8, None, method="forward-only")
    assert not forward_only.choice.fits and not in_eight_bits(forward_only)


def test_a_run_takes_8_bits_by_itself_and_says_so(tmp_path: Path) -> None:
    large = prepare_tiny("grouped-query", tmp_path / "bundle", PrepareConfig(rank=384, max_length=128))
    data = tmp_path / "rows.jsonl"
    data.write_text(json.dumps({"prompt": "set", "completion": "the lamp in the kitchen"}) + "\n")
    config = TrainConfig("onnxruntime", steps=2, optimizer_states="32bit", memory_budget="1MB")
    with pytest.raises(ResourceError) as refused:
        train(large, data, tmp_path / "exact", config)
    budget = f"{needed(refused.value) - 10**6}B"
    observer = Recorder()
    config = TrainConfig("onnxruntime", steps=2, memory_budget=budget)
    train(large, data, tmp_path / "adapter", config, observer=observer)
    assert any("optimizer's states are kept in 8 bits" in notice for notice in observer.notices)
    assert observer.starts[0].plan.endswith("8-bit optimizer states")
    provenance = json.loads((tmp_path / "adapter" / "edgetune.json").read_text())["provenance"]
    assert provenance["plan"].endswith("8-bit optimizer states")


@pytest.mark.own
def test_a_step_is_the_same_in_any_number_of_passes(bundle: Bundle, tmp_path: Path) -> None:
    """Rows of different lengths, packed; validation as well."""
    data = tmp_path / "rows.jsonl"
    words = ["lamp", "on", "off", "the", "in", "kitchen"]
    counts = (4, 20, 8, 16, 30, 4, 12, 25, 6, 22, 15, 10)
    lines = [{"prompt": "set", "completion": " ".join(words[i % 6] for i in range(count))} for count in counts]
    data.write_text("".join(json.dumps(line) + "\n" for line in lines))
    config = TrainConfig("onnxruntime", batch_size=8, steps=4, learning_rate=1e-2, schedule="constant")

    def run(name: str, budget: str | None) -> Recorder:
        observer = Recorder()
        train(bundle.path, data, tmp_path / name, replace(config, memory_budget=budget), valid=data, observer=observer)
        return observer

    whole = run("whole", None)
    with pytest.raises(ResourceError) as refused:
        run("divided", "1MB")
    divided = run("divided", f"{needed(refused.value)}B")
    assert (divided.starts[0].pass_rows, whole.starts[0].pass_rows) == (1, 8)
    for figure, tolerance in (("loss", 1e-5), ("grad_norm", 1e-4)):
        found, expected = ([getattr(metrics, figure) for metrics in seen.steps] for seen in (divided, whole))
        assert len(expected) == 4
        np.testing.assert_allclose(found, expected, rtol=tolerance)
    assert len(whole.validations) == 3
    np.testing.assert_allclose(divided.validations, whole.validations, rtol=1e-5)
    left, right = (load_file(tmp_path / name / "adapter_model.safetensors") for name in ("divided", "whole"))
    assert left.keys() == right.keys()
    for name, values in right.items():
        # A hundredth of a step: AdamW's first steps are of one length, however small a gradient and its rounding are.
        np.testing.assert_allclose(left[name], values, rtol=0, atol=1e-4, err_msg=name)
    provenance = json.loads((tmp_path / "divided" / "edgetune.json").read_text())["provenance"]
    assert provenance["pass_rows"] == "1"
    assert json.loads(provenance["options"])["batch_size"] == 8


@pytest.mark.parametrize(
    ("options", "rows", "share"),
    [
        ({}, [30, 12, 30, 21], 1.0),
        ({"lower_layers_cache": "8kB"}, [30, 12, 30, 21], 0.49),
        ({"epochs": 1}, [], 0.0),
        ({"epochs": 1, "method": "forward-only"}, [30, 12, 30, 21], 1.0),
        ({"epochs": 1, "valid": [16, 9]}, [16, 9], 1.0),
    ],
    ids=["epochs", "budget", "one epoch", "forward-only", "validation"],
)
def test_of_rows_that_come_again_the_states_are_kept(
    bundle: Bundle, options: dict[str, Any], rows: list[int], share: float
) -> None:
    """Rows that are alike, here those of 30 tokens, are one row."""
    given = dict(options)
    valid = [Example(line, [2] * length, [2] * length) for line, length in enumerate(given.pop("valid", []), 1)]
    config = replace(TrainConfig(runtime="onnxruntime", layers="1", batch_size=2, epochs=3), **given)
    train_rows = [Example(line, [1] * length, [1] * length) for line, length in enumerate([30, 12, 30, 21], 1)]
    plan = Fitting(bundle, train_rows, valid, request_of(config)).fit().choice.plan
    assert isinstance(plan, LayeredPlan) and plan.states is not None
    width = bundle.manifest.architecture.hidden_size
    assert plan.states.all_bytes == sum(record_bytes(length, width) for length in set(rows))
    assert plan.states.share == pytest.approx(share, abs=0.01)
    assert plan.states.rows == 3 + len(valid)
    assert plan.kept_text.startswith("what enters layer 1 kept on disk") == bool(share)
    all_layers = request_of(replace(config, layers=None, lower_layers_cache=TrainConfig.lower_layers_cache))
    whole = Fitting(bundle, train_rows, valid, all_layers).fit().choice.plan
    assert isinstance(whole, LayeredPlan) and whole.states is None


@pytest.mark.parametrize(
    ("asked", "layers", "said"),
    [
        ("0-3,16-31", [*range(4), *range(16, 32)], "layers 0-3 and 16-31"),
        ("7, 5,6-9", list(range(5, 10)), "layers 5-9"),
        ("0,2,30-", [0, 2, 30, 31], "layers 0 and 2 and 30-31"),
        ("4", [4], "layer 4"),
    ],
)
def test_layers_are_taken_as_lists(bundle: Bundle, asked: str, layers: list[int], said: str) -> None:
    deep = replace(bundle.manifest, architecture=replace(bundle.manifest.architecture, num_hidden_layers=32))
    found = trained_layers(deep, request_of(TrainConfig(layers=asked)), 0)
    assert found == tuple(layers) and layers_text(layers) == said
    assert trained_layers(deep, request_of(TrainConfig(layers="0-15,10-")), 0) is None, "these are all"


@pytest.mark.own
def test_layers_between_those_that_are_trained_learn_nothing(tmp_path: Path) -> None:
    make_checkpoint(tmp_path / "checkpoint", Size(hidden=64, intermediate=96, layers=3, heads=2, vocabulary=448))
    deep = prepare_checkpoint(tmp_path / "checkpoint", tmp_path / "bundle", CONFIG)
    adapter = {
        name: np.zeros_like(value) if name.startswith("model.layers.1.") and ".lora_B." in name else value
        for name, value in adapter_of(deep).items()
    }
    some = {name: value for name, value in adapter.items() if not name.startswith("model.layers.1.")}
    batch, found = batch_of(deep, rows_of(1, [12, 30])), []
    for parameters, layers in ((adapter, None), (some, (0, 2))):
        plan = LayeredPlan(kept_layers=3, layers=layers)
        with onnxruntime.open_session(deep, parameters, OPTIMIZER, plan) as session:
            loss = session.step([batch], LEARNING_RATE).loss
            found.append((loss, session.gradients()))  # type: ignore[attr-defined]
    (every_loss, every), (loss, own) = found
    assert loss == pytest.approx(every_loss, rel=1e-6) and own.keys() == some.keys()
    for name, gradient in own.items():
        np.testing.assert_allclose(gradient, every[name], rtol=0, atol=1e-6 * np.abs(every[name]).max(), err_msg=name)
