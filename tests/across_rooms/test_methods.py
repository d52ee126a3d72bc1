"""rsLoRA, patterns, named targets and some of the layers: from `prepare` to answers, against PyTorch + PEFT."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from peft import PeftModel

from edgetune.config import Base, ExportConfig, PlanName, PrepareConfig, TrainConfig
from edgetune.data.batches import make_batch
from edgetune.data.encode import Example
from edgetune.errors import IncompatibleError, UsageError
from edgetune.exporting import export
from edgetune.formats.adapter import read_adapter, write_adapter
from edgetune.formats.bundle import Bundle, load_bundle
from edgetune.formats.genai import open_model
from edgetune.formats.row_norms import read_row_norms
from edgetune.formats.storage import atomic_folder
from edgetune.generation import generate_ids
from edgetune.model.architecture import slots_of
from edgetune.model.lora import initial_parameters
from edgetune.planning.memory import Work
from edgetune.planning.planner import Planner
from edgetune.runtimes import onnxruntime as stock
from edgetune.runtimes import openvino
from edgetune.runtimes.contract import Session
from edgetune.runtimes.execution import ExecutionPlan, LayeredPlan, WholePlan
from edgetune.runtimes.onnx_session import open_graph
from edgetune.training import train
from support import oracle
from support.oracle import relative
from support.prepared_bundles import Prepared, prepare_tiny
from support.random_rows import lengths_of, rows_of
from support.tiny_phi3 import checkpoint, greedy, torch_model
from support.tiny_step import LEARNING_RATE, OPTIMIZER, adapter_of, batch_of

VARIANT = "grouped-query"
CONFIG = PrepareConfig(rank=4, alpha=8.0, max_length=128)
METHODS = {
    "rslora": replace(CONFIG, rslora=True, alpha=3.0),
    "patterns": replace(
        CONFIG, rank_pattern={"down_proj": 6, "qkv_proj": 2}, alpha_pattern={"down_proj": 5.0, "o_proj": 3.0}
    ),
    "rslora with patterns": replace(CONFIG, rslora=True, rank_pattern={"gate_up_proj": 9}, alpha_pattern={"o_proj": 1}),
    "named targets": replace(CONFIG, targets="down_proj,qkv_proj"),
    "one target": replace(CONFIG, targets="gate_up_proj"),
}
PLANS: dict[str, ExecutionPlan] = {
    "whole": WholePlan(),
    "recompute": LayeredPlan(kept_layers=0, resident=False, head_rows=16, head_tokens=100),
    "keep": LayeredPlan(kept_layers=2, resident=True, head_rows=1024),
}
BASES: list[Base] = ["fp32", "int4"]
WITHIN = {"fp32": 1e-4, "int4": 2e-3}
"""Largest relative error of a gradient."""
STEPS = 20
PROMPT = [5, 17, 200, 33, 90, 41, 7]
NEW_TOKENS = 12
Of = Callable[[str, Base], Bundle]
each_method = pytest.mark.parametrize("method", METHODS)
each_base = pytest.mark.parametrize("base", BASES)


@pytest.fixture(scope="module")
def of(tmp_path_factory: pytest.TempPathFactory) -> Of:
    torch.set_num_threads(1)  # these models are too small for two

    @cache
    def bundle(method: str, base: Base) -> Bundle:
        folder = tmp_path_factory.mktemp("methods") / "bundle"
        prepare_tiny(VARIANT, folder, replace(METHODS[method], base=base))
        return load_bundle(folder)

    return bundle


def strong(bundle: Bundle) -> dict[str, NDArray[np.float32]]:
    """Parameters that change answers."""
    return {name: 4 * value for name, value in adapter_of(bundle).items()}


def written(folder: Path, bundle: Bundle, parameters: Mapping[str, NDArray[np.float32]]) -> Path:
    manifest = bundle.manifest
    with atomic_folder(folder) as made:
        write_adapter(
            made,
            base=manifest.base,
            tokenizer=manifest.tokenizer,
            lora=manifest.lora,
            parameters=parameters,
            provenance={},
        )
    return folder


@pytest.mark.parametrize("plan", PLANS)
@each_base
@each_method
def test_loss_and_gradients_are_pefts(of: Of, method: str, base: Base, plan: str) -> None:
    bundle = of(method, base)
    parameters = adapter_of(bundle)
    rows = rows_of(1, lengths_of(VARIANT, 1))
    model = oracle.peft_model(checkpoint(VARIANT), bundle, parameters)
    loss = oracle.loss(model, rows)
    loss.backward()
    with stock.open_session(bundle, parameters, OPTIMIZER, PLANS[plan]) as session:
        result = session.step([batch_of(bundle, rows)], LEARNING_RATE)
        found = session.gradients()  # type: ignore[attr-defined]
    assert result.loss == pytest.approx(loss.item(), rel=1e-4)
    trainable = oracle.trainable(model)
    assert set(trainable) == set(found)
    for name, parameter in trainable.items():
        assert parameter.grad is not None
        assert relative(found[name], parameter.grad.numpy()) <= WITHIN[base], name


@pytest.mark.parametrize("method", ["rslora with patterns", "patterns", "named targets"])
def test_openvinos_gradients_are_pefts(of: Of, method: str) -> None:
    """Within what bfloat16 holds, where the processor has it."""
    bundle = of(method, "int4")
    parameters = adapter_of(bundle)
    rows = rows_of(1, lengths_of(VARIANT, 1))
    model = oracle.peft_model(checkpoint(VARIANT), bundle, parameters)
    loss = oracle.loss(model, rows)
    loss.backward()
    plan = replace(PLANS["keep"], precision=openvino.abilities().exact.precision)  # type: ignore[type-var, union-attr]
    with openvino.open_session(bundle, parameters, OPTIMIZER, plan) as session:
        result = session.step([batch_of(bundle, rows)], LEARNING_RATE)
        found = session.gradients()  # type: ignore[attr-defined]
    assert result.loss == pytest.approx(loss.item(), rel=2e-2)
    for name, parameter in oracle.trainable(model).items():
        assert parameter.grad is not None
        assert relative(found[name], parameter.grad.numpy()) <= 5e-2, name


def follow(session: Session, bundle: Bundle, model: Any, optimizer: torch.optim.Optimizer, within: float) -> None:
    """Twenty steps of both; every loss has to be within a relative difference of PyTorch's."""
    for step in range(STEPS):
        rows = rows_of(step, lengths_of(VARIANT, step))
        loss = oracle.loss(model, rows)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(oracle.trainable(model).values(), OPTIMIZER.max_grad_norm)
        optimizer.step()
        result = session.step([batch_of(bundle, rows)], LEARNING_RATE)
        assert result.loss == pytest.approx(loss.item(), rel=within)


@pytest.mark.parametrize("plan", ["whole", "keep"])
@pytest.mark.parametrize("method", ["rslora", "patterns"])
def test_twenty_steps_follow_peft(of: Of, method: str, plan: str) -> None:
    bundle = of(method, "int4")
    parameters = adapter_of(bundle)
    model = oracle.peft_model(checkpoint(VARIANT), bundle, parameters)
    trainable = oracle.trainable(model)
    optimizer = torch.optim.AdamW(trainable.values(), lr=LEARNING_RATE, weight_decay=OPTIMIZER.weight_decay)
    with stock.open_session(bundle, parameters, OPTIMIZER, PLANS[plan]) as session:
        follow(session, bundle, model, optimizer, 1e-3)


@each_method
def test_an_adapter_has_the_same_logits_in_peft_and_comes_back(
    of: Of, method: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")  # otherwise PEFT asks the hub for the base, again and again
    bundle = of(method, "fp32")
    parameters = strong(bundle)
    folder = written(tmp_path / "adapter", bundle, parameters)
    manifest = bundle.manifest
    ours = oracle.peft_model(checkpoint(VARIANT), bundle, parameters)
    theirs = PeftModel.from_pretrained(torch_model(VARIANT, bundle.path), folder).eval()
    ids = torch.tensor([PROMPT])
    with torch.no_grad():
        logits = theirs(ids).logits
        torch.testing.assert_close(logits, ours(ids).logits, rtol=1e-5, atol=1e-5)
    loss = open_graph(bundle.file("loss"))
    batch = make_batch([Example(1, PROMPT, PROMPT)], manifest.architecture.rope, 0, multiple_of=1)
    (predictions,) = loss.run(["predictions"], {**batch.tensors(), **parameters})
    np.testing.assert_array_equal(predictions, logits.argmax(-1).numpy())
    theirs.save_pretrained(tmp_path / "peft")
    back = read_adapter(tmp_path / "peft", manifest.lora, manifest.base, manifest.tokenizer)
    for name, value in parameters.items():
        np.testing.assert_array_equal(back[name], value)
    config = json.loads((folder / "adapter_config.json").read_text())
    assert config["use_rslora"] is METHODS[method].rslora
    assert config["rank_pattern"] == (METHODS[method].rank_pattern or {})


def greedy_by_loss_graph(bundle: Bundle, adapter: Mapping[str, Any]) -> list[int]:
    """Append the graph's prediction at the last position, again and again."""
    session, ids = open_graph(bundle.file("loss")), list(PROMPT)
    while len(ids) < len(PROMPT) + NEW_TOKENS:
        batch = make_batch([Example(1, ids, ids)], bundle.manifest.architecture.rope, 0, multiple_of=1)
        token = int(session.run(["predictions"], {**batch.tensors(), **adapter})[0][0, -1])
        if token in open_model(bundle.path).eos_token_ids:
            break
        ids.append(token)
    return ids[len(PROMPT) :]


@each_base
@each_method
def test_genai_answers_as_the_evaluation_graph_and_peft_do(of: Of, method: str, base: Base, tmp_path: Path) -> None:
    bundle = of(method, base)
    parameters = strong(bundle)
    adapter = written(tmp_path / "adapter", bundle, parameters)
    wanted = greedy_by_loss_graph(bundle, parameters)
    plain = greedy_by_loss_graph(bundle, {name: np.zeros_like(value) for name, value in parameters.items()})
    assert wanted != plain, "an adapter that changes nothing shows nothing"
    theirs = greedy(PeftModel.from_pretrained(torch_model(VARIANT, bundle.path), adapter), PROMPT, NEW_TOKENS)
    assert wanted == theirs[: len(wanted)], "the oracle goes on behind the end of an answer"
    for merge in (False, True):
        model = export(bundle, adapter, tmp_path / f"model-{merge}", ExportConfig(merge=merge)).path
        assert generate_ids(model, PROMPT, NEW_TOKENS) == wanted


LAYERS = {"upper": range(1, 2), "lower": range(1)}
LAYER_PLANS = {
    "recompute": LayeredPlan(kept_layers=0, resident=False, head_rows=16, head_tokens=100),
    "keep": LayeredPlan(kept_layers=1, resident=True, head_rows=1024),
    "lean": LayeredPlan(kept_layers=0, resident=False, lean=True),
}
each_layers = pytest.mark.parametrize("layers", LAYERS)


def of_layers(bundle: Bundle, layers: range) -> dict[str, NDArray[np.float32]]:
    names = bundle.manifest.lora.of_layers(layers).shapes()
    return {name: value for name, value in adapter_of(bundle).items() if name in names}


def peft_of(folder: Path, bundle: Bundle) -> PeftModel:
    """What PEFT makes of an adapter folder beside the bundle's weights, to be trained."""
    return PeftModel.from_pretrained(torch_model(VARIANT, bundle.path), folder, is_trainable=True).eval()


@pytest.mark.parametrize("plan", LAYER_PLANS)
@each_layers
@each_base
def test_gradients_of_some_layers_are_pefts(
    prepared: Prepared, base: Base, layers: str, plan: str, tmp_path: Path
) -> None:
    """The oracle has `layers_to_transform`; in other layers it has no slots at all."""
    bundle, span = prepared(VARIANT, base), LAYERS[layers]
    parameters = of_layers(bundle, span)
    model = peft_of(written(tmp_path / "adapter", bundle, parameters), bundle)
    rows = rows_of(1, lengths_of(VARIANT, 1))
    loss = oracle.loss(model, rows)
    loss.backward()
    how = replace(LAYER_PLANS[plan], layers=span)
    with stock.open_session(bundle, parameters, OPTIMIZER, how) as session:
        assert session.evaluate(batch_of(bundle, rows)) == pytest.approx(loss.item(), rel=1e-4)
        result = session.step([batch_of(bundle, rows)], LEARNING_RATE)
        found = session.gradients()  # type: ignore[attr-defined]
    assert result.loss == pytest.approx(loss.item(), rel=1e-4)
    trainable = oracle.trainable(model)
    assert set(trainable) == set(found) == set(parameters)
    within = 2e-3 if LAYER_PLANS[plan].lean else WITHIN[base]
    for name, parameter in trainable.items():
        assert parameter.grad is not None
        assert relative(found[name], parameter.grad.numpy()) <= within, name


@each_layers
def test_openvinos_gradients_of_some_layers_are_pefts(prepared: Prepared, layers: str, tmp_path: Path) -> None:
    bundle, span = prepared(VARIANT, "int4"), LAYERS[layers]
    parameters = of_layers(bundle, span)
    model = peft_of(written(tmp_path / "adapter", bundle, parameters), bundle)
    rows = rows_of(1, lengths_of(VARIANT, 1))
    loss = oracle.loss(model, rows)
    loss.backward()
    exact = openvino.abilities().exact
    assert exact is not None
    plan = LayeredPlan(precision=exact.precision, kept_layers=1, layers=span)
    with openvino.open_session(bundle, parameters, OPTIMIZER, plan) as session:
        session.step([batch_of(bundle, rows)], LEARNING_RATE)
        found = session.gradients()  # type: ignore[attr-defined]
    assert set(found) == set(parameters)
    for name, parameter in oracle.trainable(model).items():
        assert parameter.grad is not None
        assert relative(found[name], parameter.grad.numpy()) <= 5e-2, name


@each_layers
def test_twenty_steps_of_some_layers_follow_peft(prepared: Prepared, layers: str, tmp_path: Path) -> None:
    bundle, span = prepared(VARIANT, "int4"), LAYERS[layers]
    parameters = of_layers(bundle, span)
    model = peft_of(written(tmp_path / "adapter", bundle, parameters), bundle)
    trainable = oracle.trainable(model)
    optimizer = torch.optim.AdamW(trainable.values(), lr=LEARNING_RATE, weight_decay=OPTIMIZER.weight_decay)
    plan = replace(LAYER_PLANS["keep"], layers=span)
    with stock.open_session(bundle, parameters, OPTIMIZER, plan) as session:
        follow(session, bundle, model, optimizer, 1e-3)


@each_layers
def test_a_run_of_some_layers_writes_what_peft_loads_and_goes_on_from_it(
    prepared: Prepared, layers: str, tmp_path: Path
) -> None:
    bundle, span = prepared(VARIANT, "int4"), LAYERS[layers]
    rows = tmp_path / "rows.jsonl"
    rows.write_text('{"prompt": "what is it?", "completion": " the lamp in the kitchen"}\n' * 4)
    config = TrainConfig("onnxruntime", layers=str(span.start), steps=3, learning_rate=0.01)
    result = train(bundle, rows, tmp_path / "adapter", config)
    assert f"layer {span.start} trained" in result.plan
    written_config = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    assert written_config["layers_to_transform"] == list(span)
    manifest = bundle.manifest
    found = read_adapter(tmp_path / "adapter", manifest.lora, manifest.base, manifest.tokenizer)
    moved = {slot.layer for slot in manifest.lora.slots if found[slot.b].any()}
    assert moved == set(span)
    theirs = peft_of(tmp_path / "adapter", bundle)
    assert oracle.trainable(theirs).keys() == manifest.lora.of_layers(span).shapes().keys()
    whole = oracle.peft_model(checkpoint(VARIANT), bundle, found)
    ids = torch.tensor([PROMPT])
    with torch.no_grad():
        torch.testing.assert_close(theirs(ids).logits, whole(ids).logits, rtol=1e-5, atol=1e-5)
    train(bundle, rows, tmp_path / "further", replace(config, init_adapter=tmp_path / "adapter"))
    other = replace(config, layers=str(1 - span.start), init_adapter=tmp_path / "adapter")
    with pytest.raises(IncompatibleError, match=f"changes 4 projections of layers that .*layer.?s?.{span.start}"):
        train(bundle, rows, tmp_path / "other", other)


@pytest.mark.parametrize(
    ("config", "reason"),
    [
        (TrainConfig(layers="1-0"), "--layers '1-0': expected layers counted from 0, such as 16-31, 16-,"),
        (TrainConfig(layers="-1"), "--layers '-1': expected"),
        (TrainConfig(layers="0,,1"), "--layers '0,,1': expected"),
        (TrainConfig(layers="1,2"), "--layers 1,2: the bundle has layers 0 to 1"),
        (TrainConfig(layers="1-2"), "--layers 1-2: the bundle has layers 0 to 1"),
        (TrainConfig(layers="2-"), "--layers 2-: the bundle has layers 0 to 1"),
        (TrainConfig(layers="1", plan="whole"), "--layers 1 trains layer by layer, and the whole step as one graph"),
        (TrainConfig("ort-training", layers="1"), "--layers 1 trains layer by layer, and the whole step as one graph"),
        (TrainConfig("qnn", layers="1"), "--layers 1 trains layer by layer, and the whole step as one graph"),
    ],
    ids=str,
)
def test_layers_that_cannot_be_meant_are_refused_by_name(
    prepared: Prepared, config: TrainConfig, reason: str, tmp_path: Path
) -> None:
    rows = tmp_path / "rows.jsonl"
    rows.write_text('{"prompt": "what is it?", "completion": " the lamp"}\n')
    with pytest.raises(UsageError, match=re.escape(reason)):
        train(prepared(VARIANT, "int4"), rows, tmp_path / "adapter", config)


def test_a_run_of_all_layers_is_that_without_the_option(prepared: Prepared, tmp_path: Path) -> None:
    rows = tmp_path / "rows.jsonl"
    rows.write_text('{"prompt": "what is it?", "completion": " the lamp"}\n')
    bundle, files = prepared(VARIANT, "int4"), []
    for name, layers in (("all", None), ("asked", "0-")):
        config = TrainConfig("onnxruntime", plan="keep", layers=layers, steps=2)
        train(bundle, rows, tmp_path / name, config)
        files.append(
            [(tmp_path / name / file).read_bytes() for file in ("adapter_model.safetensors", "adapter_config.json")]
        )
    assert files[0] == files[1]


@pytest.mark.parametrize("plan", ["keep", "recompute", "stream"])
def test_fewer_layers_take_less_memory_and_less_work(prepared: Prepared, plan: PlanName) -> None:
    """Of gradients, activations and the optimizer's state; as many weights."""
    manifest, footprint = prepared(VARIANT, "int4").manifest, stock.abilities().exact
    assert footprint is not None
    architecture = replace(manifest.architecture, num_hidden_layers=32)
    lora = replace(manifest.lora, slots=slots_of(architecture, manifest.lora.target_modules))
    deep = replace(manifest, architecture=architecture, lora=lora)
    work = Work(positions=100_000, scores=10_000)
    found = [
        Planner(deep, footprint, work, LayeredPlan(layers=layers)).choose(plan, None)
        for layers in (None, range(16, 32), range(16))
    ]
    every, upper, lower = (prediction for prediction in found if prediction is not None)
    assert upper.peak_memory_bytes < 0.9 * every.peak_memory_bytes
    assert upper.cost < 0.8 * every.cost
    assert upper.plan.kept_layers == (16 if plan == "keep" else 0)
    # All gradients pass through the layer above; its slots' are not kept.
    assert lower.cost == every.cost
    assert every.peak_memory_bytes - lower.peak_memory_bytes == 5 * 4 * lora.of_layers(range(16, 32)).parameters


@pytest.fixture(scope="module")
def with_magnitudes(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    """DoRA, rsLoRA, ranks of their own and named targets at once."""
    folder = tmp_path_factory.mktemp("magnitudes") / "bundle"
    config = replace(
        CONFIG, dora=True, rslora=True, targets="qkv_proj,down_proj", rank_pattern={"down_proj": 6}, base="int4"
    )
    prepare_tiny(VARIANT, folder, config)
    return load_bundle(folder)


@pytest.mark.parametrize("plan", PLANS)
def test_magnitudes_go_with_ranks_of_their_own(with_magnitudes: Bundle, plan: str) -> None:
    bundle = with_magnitudes
    parameters = adapter_of(bundle)
    rows = rows_of(1, lengths_of(VARIANT, 1))
    model = oracle.peft_model(checkpoint(VARIANT), bundle, parameters)
    loss = oracle.loss(model, rows)
    loss.backward()
    with stock.open_session(bundle, parameters, OPTIMIZER, PLANS[plan]) as session:
        result = session.step([batch_of(bundle, rows)], LEARNING_RATE)
        found = session.gradients()  # type: ignore[attr-defined]
    assert result.loss == pytest.approx(loss.item(), rel=1e-4)
    trainable = oracle.trainable(model)
    assert set(trainable) == set(found) == set(bundle.manifest.lora.shapes())
    for name, parameter in trainable.items():
        assert parameter.grad is not None
        assert relative(found[name], parameter.grad.numpy()) <= WITHIN["int4"], name


@each_layers
def test_magnitudes_of_some_layers_are_pefts(with_magnitudes: Bundle, layers: str) -> None:
    """Another layer's slots change nothing: their magnitudes are the row norms, and B is zero."""
    bundle, span = with_magnitudes, LAYERS[layers]
    norms = read_row_norms(bundle)
    first = initial_parameters(bundle.manifest.lora, 0, norms)
    parameters = of_layers(bundle, span)
    rows = rows_of(1, lengths_of(VARIANT, 1))
    model = oracle.peft_model(checkpoint(VARIANT), bundle, first | parameters)
    loss = oracle.loss(model, rows)
    loss.backward()
    with stock.open_session(bundle, parameters, OPTIMIZER, replace(LAYER_PLANS["keep"], layers=span)) as session:
        result = session.step([batch_of(bundle, rows)], LEARNING_RATE)
        found = session.gradients()  # type: ignore[attr-defined]
    assert result.loss == pytest.approx(loss.item(), rel=1e-4)
    assert set(found) == set(parameters)
    for name, parameter in oracle.trainable(model).items():
        if name in found:
            assert parameter.grad is not None
            assert relative(found[name], parameter.grad.numpy()) <= WITHIN["int4"], name


def test_a_run_with_magnitudes_goes_on_where_it_was_cut_off(with_magnitudes: Bundle, tmp_path: Path) -> None:
    data = tmp_path / "rows.jsonl"
    data.write_text("".join(json.dumps({"text": text}) + "\n" for text in ("one two three", "four five", "six")))
    config = TrainConfig(
        runtime="onnxruntime", steps=6, batch_size=2, learning_rate=1e-2, schedule="constant", keep_state=True
    )
    train(with_magnitudes, data, tmp_path / "whole", config)
    train(with_magnitudes, data, tmp_path / "cut", replace(config, steps=3))
    train(with_magnitudes, data, tmp_path / "cut", replace(config, resume=True))
    whole, cut = ((tmp_path / name / "adapter_model.safetensors").read_bytes() for name in ("whole", "cut"))
    assert whole == cut


@pytest.mark.parametrize("runtime", [stock, openvino], ids=["onnxruntime", "openvino"])
def test_b_matrices_learn_at_their_own_rate(of: Of, runtime: Any) -> None:
    """LoRA+ against torch.optim.AdamW with two groups, over twenty steps; OpenVINO within bfloat16."""
    ratio, bundle = 16.0, of("patterns", "fp32")
    parameters = adapter_of(bundle)
    model = oracle.peft_model(checkpoint(VARIANT), bundle, parameters)
    trainable = oracle.trainable(model)
    optimizer = torch.optim.AdamW(
        [
            {"params": [value for name, value in trainable.items() if ".lora_A." in name], "lr": LEARNING_RATE},
            {"params": [value for name, value in trainable.items() if ".lora_B." in name], "lr": ratio * LEARNING_RATE},
        ],
        weight_decay=OPTIMIZER.weight_decay,
    )
    plan = replace(PLANS["keep"], precision=runtime.abilities().exact.precision)  # type: ignore[type-var]
    exact = plan.precision == "fp32"  # type: ignore[attr-defined]
    with runtime.open_session(bundle, parameters, replace(OPTIMIZER, lora_plus_ratio=ratio), plan) as session:
        follow(session, bundle, model, optimizer, 1e-3 if exact else 2e-2)
        learnt = session.adapter()
    if exact:
        for name, value in trainable.items():
            assert relative(learnt[name], value.detach().numpy()) <= 5e-3, name


@pytest.mark.parametrize(
    "options", [{"plan": "whole"}, {"runtime": "ort-training"}, {"method": "forward-only"}], ids=lambda each: str(each)
)
def test_one_rate_of_the_whole_step_refuses_two(of: Of, options: dict[str, Any], tmp_path: Path) -> None:
    config = TrainConfig(**options, lora_plus_ratio=16.0)
    with pytest.raises(UsageError, match="--lora-plus-ratio 16 "):
        train(of("rslora", "fp32"), tmp_path / "rows.jsonl", tmp_path / "adapter", config)
