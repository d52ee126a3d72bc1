"""The split way: an int8 trunk below, training above."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import onnx
import onnxruntime as ort
import pytest
import torch
from click.testing import CliRunner
from numpy.typing import NDArray
from onnx import numpy_helper

from edgetune.cli import main
from edgetune.config import Base, SplitConfig
from edgetune.errors import DataError, IncompatibleError, MissingDependencyError, UsageError, VerificationError
from edgetune.evaluation import evaluate
from edgetune.formats.adapter import read_adapter
from edgetune.formats.bundle import Bundle
from edgetune.formats.frozen_weights import FrozenWeights
from edgetune.formats.trunk import GRAPH, INDEX, read_trunk_info
from edgetune.model.lora import Parameters
from edgetune.runtimes import onnxruntime as stock
from edgetune.runtimes.execution import KeptStates, LayeredPlan, TrunkUse
from edgetune.runtimes.layered import lower_layers as trunk_module
from edgetune.runtimes.layered.cached_states import record_bytes
from edgetune.runtimes.layered.lower_layers import (
    VITIS_AI,
    QuantisedLayers,
    Trunk,
    open_trunk,
    open_trunk_graph,
    trunk_placement,
    vitisai_options,
)
from edgetune.runtimes.layered.onnxruntime.backend import OrtBackend
from edgetune.runtimes.layered.session import LayeredSession
from edgetune.runtimes.placement import Node
from edgetune.split import split
from edgetune.split.conformance import check_file
from edgetune.training import train
from support.bundle_copy import opened_copy
from support.oracle import relative
from support.prepared_bundles import Prepared, each_bundle
from support.random_rows import lengths_of, rows_of
from support.split_runs import WHOLE, FloatLayers, options_of, split_in_the_middle, write_split_rows
from support.tiny_phi3 import checkpoint
from support.tiny_step import LEARNING_RATE, OPTIMIZER, adapter_of, batch_of

Floats = NDArray[np.float32]
ABOVE = LayeredPlan(kept_layers=1, trunk=TrunkUse(layers=1))


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> None:
    torch.set_num_threads(1)  # these models are too small for two


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_split_rows(tmp_path_factory.mktemp("rows"))


@pytest.fixture(scope="module")
def halves(prepared: Prepared, data: Path, tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    """A bundle of two layers, split in the middle."""
    return split_in_the_middle(prepared("multi-head", "int4"), data, tmp_path_factory.mktemp("split") / "bundle")


def session_above(
    bundle: Bundle, parameters: Parameters, trunk: Trunk | None, plan: LayeredPlan = ABOVE
) -> LayeredSession:
    return LayeredSession(bundle, parameters, OPTIMIZER, plan, OrtBackend(bundle, "fp32"), trunk)


def quiet_trunk(adapter: dict[str, Floats]) -> dict[str, Floats]:
    """An adapter that changes nothing in the first layer."""
    return {
        name: np.zeros_like(value) if name.startswith("model.layers.0.") and ".lora_B." in name else value
        for name, value in adapter.items()
    }


def upper(adapter: Parameters) -> dict[str, Floats]:
    return {name: value for name, value in adapter.items() if name.startswith("model.layers.1.")}


@pytest.mark.own
@pytest.mark.parametrize(
    ("plan", "tolerance"),
    [
        (ABOVE, 1e-4),
        (replace(ABOVE, kept_layers=0, resident=False), 1e-4),
        # What enters a layer is kept in 16 bits.
        (replace(ABOVE, kept_layers=0, lean=True), 1e-2),
    ],
    ids=["keep", "stream", "lean"],
)
@each_bundle
def test_with_an_exact_trunk_loss_and_gradients_are_the_whole_models(
    prepared: Prepared, variant: str, base: Base, plan: LayeredPlan, tolerance: float
) -> None:
    bundle = prepared(variant, base)
    adapter = quiet_trunk(adapter_of(bundle))
    batch = batch_of(bundle, rows_of(1, lengths_of(variant, 1)))
    with stock.open_session(bundle, adapter, OPTIMIZER, WHOLE) as whole:
        loss = whole.evaluate(batch)
        result = whole.step([batch], LEARNING_RATE)
        expected = whole.gradients()
    trunk = Trunk(FrozenWeights(bundle.path, bundle.manifest.architecture), FloatLayers(bundle, 1))
    above = session_above(bundle, upper(adapter), trunk, plan)
    assert above.evaluate(batch) == pytest.approx(loss, rel=1e-5)
    assert above.step([batch], LEARNING_RATE).loss == pytest.approx(result.loss, rel=1e-5)
    found = above.gradients()
    assert found.keys() == upper(expected).keys()
    for name, gradient in found.items():
        assert relative(gradient, expected[name]) <= tolerance, name


@pytest.mark.own
def test_the_int8_trunk_is_close_to_the_float_one(prepared: Prepared, halves: Bundle) -> None:
    batch = batch_of(halves, rows_of(3, [30, 21, 8]))
    found = Trunk(FrozenWeights(halves.path, halves.manifest.architecture), QuantisedLayers(halves)).hidden(batch)
    exact = Trunk(
        FrozenWeights(halves.path, halves.manifest.architecture), FloatLayers(prepared("multi-head", "int4"), 1)
    ).hidden(batch)
    real = batch.rows >= 0
    cosines = (
        (found * exact).sum(-1)[real] / np.linalg.norm(found, axis=-1)[real] / np.linalg.norm(exact, axis=-1)[real]
    )
    assert cosines.mean() >= 0.99
    assert not np.array_equal(found[real], exact[real]), "one of them is not what it is called"
    assert not found[~real].any()


def test_scales_are_powers_of_two_and_hold_the_integers(halves: Bundle) -> None:
    """Every QuantizeLinear and DequantizeLinear, by numbers read from the file."""
    model = onnx.load(halves.file(GRAPH))
    arrays = {tensor.name: numpy_helper.to_array(tensor) for tensor in model.graph.initializer}
    nodes = [node for node in model.graph.node if node.op_type in ("QuantizeLinear", "DequantizeLinear")]
    products = [node for node in model.graph.node if node.op_type == "MatMul"]
    assert len(products) == 9, "query, key, value, scores, context, output, gate, up, down"
    assert len(nodes) >= 2 * len(products)
    for node in nodes:
        scale, zero = (arrays[name] for name in node.input[1:3])
        assert scale.shape == ()
        assert np.log2(float(scale)).is_integer()
        assert (zero.dtype, int(zero)) == (np.int8, 0)
    weights = [array for array in arrays.values() if array.ndim == 2]
    assert len(weights) == 7
    assert all(array.dtype == np.int8 for array in weights)
    assert all(np.abs(array.astype(int)).max() > 48 for array in weights), "a scale is too large"


def test_the_cpu_provider_computes_the_graphs_integers(halves: Bundle) -> None:
    """Optimised, with 8-bit kernels, and as the file says, quantised and dequantised in float32: the same bits."""
    options = ort.SessionOptions()
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    plain = ort.InferenceSession(halves.file(GRAPH), options, providers=["CPUExecutionProvider"])
    fast = open_trunk_graph(halves)
    generator = np.random.default_rng(0)
    inputs = {
        value.name: generator.standard_normal(value.shape).astype(np.float32) * (0 if value.name == "attn_bias" else 1)
        for value in plain.get_inputs()
    }
    products = [node.output[0] for node in onnx.load(halves.file(GRAPH)).graph.node if node.op_type == "MatMul"]
    assert products
    (expected,), (found,) = plain.run(None, inputs), fast.run(None, inputs)
    np.testing.assert_allclose(found, expected, rtol=0, atol=2e-5 * np.abs(expected).max())


def test_the_trunk_keeps_the_rules(halves: Bundle) -> None:
    assert check_file(halves.file(GRAPH)) == []


def test_a_row_is_computed_once_whatever_it_is_packed_with(halves: Bundle) -> None:
    lengths = [12, 9, 20]
    rows, width = rows_of(5, lengths), halves.manifest.architecture.hidden_size
    everything = sum(record_bytes(length, width) for length in lengths)
    found = []
    for most, computed in ((everything, 3), (record_bytes(12, width), 5), (0, 6)):
        trunk = Trunk(FrozenWeights(halves.path, halves.manifest.architecture), QuantisedLayers(halves))
        plan = replace(ABOVE, states=KeptStates(most, everything, len(rows)))
        with closing(session_above(halves, upper(quiet_trunk(adapter_of(halves))), trunk, plan)) as session:
            found.append([session.evaluate(batch_of(halves, some)) for some in (rows, rows[::-1])])
        assert trunk.computed == computed, "what fits is kept, and no more"
    assert found[0] == found[1] == found[2]
    assert found[0][0] == pytest.approx(found[0][1], rel=1e-5)
    plain = session_above(halves, upper(quiet_trunk(adapter_of(halves))), trunk)
    assert found[0][0] == pytest.approx(plain.evaluate(batch_of(halves, rows)), rel=1e-4)


@pytest.mark.own
def test_padding_and_longer_graphs_change_nothing_for_a_row(halves: Bundle) -> None:
    """What stands behind a row is not seen by it."""
    batch = batch_of(halves, rows_of(7, [11]))
    hidden = FrozenWeights(halves.path, halves.manifest.architecture).rows(
        "model.embed_tokens.weight", batch.input_ids[0]
    )
    layers = QuantisedLayers(halves)
    long = layers.forward(hidden, batch.rope_cos[0], batch.rope_sin[0])
    short = layers.forward(hidden[:11], batch.rope_cos[0, :11], batch.rope_sin[0, :11])
    np.testing.assert_array_equal(long[:11], short)


@pytest.mark.parametrize("states", ["32bit", "8bit"])
def test_training_learns_and_the_adapter_fits_everything_else(
    prepared: Prepared, halves: Bundle, data: Path, tmp_path: Path, states: str
) -> None:
    output = tmp_path / "adapter"
    result = train(halves.path, data, output, options_of(trunk=True, steps=20, optimizer_states=states), valid=data)
    assert result.first_validation_loss is not None
    assert result.last_validation_loss is not None
    assert result.last_validation_loss < 0.8 * result.first_validation_loss
    assert result.plan.startswith("split, 1 layers in the trunk")
    assert result.plan.endswith("8-bit optimizer states") == (states == "8bit")
    (placement,) = result.placement
    assert (placement["graph"], placement["batch"], placement["length"]) == (GRAPH, 1, 48)
    assert (placement["provider"], placement["fallen_back"]) == ("CPUExecutionProvider", [])
    assert placement["accelerated_nodes"] > 9, "the products and what is between them"
    provenance = json.loads((output / "edgetune.json").read_text())["provenance"]
    assert provenance["placement"] == "CPUExecutionProvider (no accelerator), all nodes"
    config = json.loads((output / "adapter_config.json").read_text())
    assert config["layers_to_transform"] == [1]
    manifest = halves.manifest
    adapter = read_adapter(output, manifest.lora, manifest.base, manifest.tokenizer)
    assert adapter.keys() == manifest.lora.shapes().keys()
    assert upper(adapter)
    assert not any(value.any() for name, value in adapter.items() if "layers.0." in name and ".lora_B." in name)
    # The bundle that was not split takes it as well, and PEFT does, with the same result.
    whole = prepared("multi-head", "int4")
    measured = evaluate(whole.path, data, adapter=output).loss
    assert measured < 0.85 * evaluate(whole.path, data).loss
    assert measured == pytest.approx(_peft_loss(whole, output, data), rel=1e-3)
    longer = train(whole.path, data, tmp_path / "all", options_of(plan="keep", steps=3, init_adapter=output))
    assert longer.final_loss < result.first_validation_loss


def _peft_loss(bundle: Bundle, adapter: Path, data: Path) -> float:
    from peft import PeftModel
    from transformers import Phi3ForCausalLM

    from edgetune.data.encode import load_encoder
    from edgetune.data.examples import load_examples
    from support import oracle

    model = Phi3ForCausalLM.from_pretrained(checkpoint("multi-head"), attn_implementation="eager")
    oracle.load_stored(model, bundle.path)
    peft = PeftModel.from_pretrained(model, adapter).eval()
    assert not any("layers.0." in name for name in oracle.trainable(peft))
    rows = load_examples(data, load_encoder(bundle.path, bundle.manifest.tokenizer), 128, truncate=False).examples
    with torch.no_grad():
        return float(oracle.loss(peft, rows))


def test_training_without_a_backward_pass_runs_the_trunk_too(halves: Bundle, data: Path, tmp_path: Path) -> None:
    config = options_of(method="forward-only", trunk=True, steps=12, queries=8)
    result = train(halves.path, data, tmp_path / "adapter", config, valid=data)
    assert result.plan.startswith("split, 1 layers in the trunk, fp32, forward only")
    assert result.first_validation_loss is not None
    assert result.last_validation_loss is not None
    assert result.last_validation_loss < result.first_validation_loss - 0.01


def test_a_trunk_has_no_adapters_to_go_on_from(prepared: Prepared, halves: Bundle, data: Path, tmp_path: Path) -> None:
    whole = prepared("multi-head", "int4")
    train(whole.path, data, tmp_path / "whole", options_of(plan="keep", steps=1))
    config = options_of(trunk=True, steps=1, init_adapter=tmp_path / "whole")
    with pytest.raises(IncompatibleError, match="changes 4 projections of the trunk"):
        train(halves.path, data, tmp_path / "above", config)


def test_what_does_not_fit_is_said_before_anything_is_loaded(
    prepared: Prepared, halves: Bundle, data: Path, tmp_path: Path
) -> None:
    whole = prepared("multi-head", "int4")
    with pytest.raises(IncompatibleError, match="has no trunk; make a bundle that has one with `edgetune split"):
        train(whole.path, data, tmp_path / "o", options_of(trunk=True, steps=1))
    long = tmp_path / "long.jsonl"
    long.write_text(json.dumps({"text": "xyz " * 25}) + "\n")
    with pytest.raises(IncompatibleError, match="the bundle's trunk takes 48; split the bundle again with --length"):
        train(halves.path, long, tmp_path / "o", options_of(trunk=True, steps=1))
    with pytest.raises(UsageError, match="means nothing without --trunk"):
        train(halves.path, data, tmp_path / "o", options_of(steps=1, vitisai_config=data))
    config = options_of(trunk=True, steps=1, vitisai_config=data)
    with pytest.raises(MissingDependencyError, match="VitisAIExecutionProvider, which this onnxruntime does not have"):
        train(halves.path, data, tmp_path / "o", config)
    assert not (tmp_path / "o").exists()


@pytest.mark.parametrize(
    ("options", "error", "reason"),
    [
        ({"layers": 2}, UsageError, "--layers 2 leaves no layer to train of 2; use at most 1"),
        ({"length": 1000}, UsageError, "--length 1000 is more than the model's 256 positions"),
    ],
)
def test_split_points_that_cannot_be(
    prepared: Prepared, data: Path, tmp_path: Path, options: dict[str, int], error: type[Exception], reason: str
) -> None:
    with pytest.raises(error, match=reason):
        split(prepared("multi-head", "int4").path, data, tmp_path / "o", SplitConfig(**options))
    assert not (tmp_path / "o").exists()


def test_no_rows_are_no_calibration(prepared: Prepared, tmp_path: Path) -> None:
    (tmp_path / "empty.jsonl").write_text("")
    with pytest.raises(DataError):
        split(prepared("multi-head", "int4").path, tmp_path / "empty.jsonl", tmp_path / "o", SplitConfig())


def test_a_broken_description_is_refused(halves: Bundle, tmp_path: Path) -> None:
    text = (halves.path / INDEX).read_text()
    copy = replace(halves, path=tmp_path)
    (tmp_path / INDEX).parent.mkdir()
    for broken in (
        text[:-20],
        text.replace('"layers": 1', '"layers": 2'),
        text.replace('"layers"', '"layer"'),
        "[]",
        text.replace('"length": 48', '"length": 47'),
        text.replace(".o_proj", ".p_proj"),
        re.sub(r'(_proj"): [0-9.]+', r"\1: NaN", text, count=1),
        re.sub(r'"errors": \[[^]]*\]', '"errors": []', text),
        text.replace('"length": 48', '"length": 4800000'),
    ):
        (tmp_path / INDEX).write_text(broken)
        with pytest.raises(VerificationError):
            read_trunk_info(copy)


def test_a_trunk_of_an_older_edgetune_is_refused(halves: Bundle, tmp_path: Path) -> None:
    """Whose scales a single row took from all others."""
    old = json.loads((halves.path / INDEX).read_text())
    old["linear"] = {name: {"input": gain, "output": gain} for name, gain in old.pop("gains").items()}
    del old["errors"]
    (tmp_path / INDEX).parent.mkdir()
    (tmp_path / INDEX).write_text(json.dumps(old))
    with pytest.raises(IncompatibleError, match=r"of an older edgetune, .*; split the bundle again"):
        read_trunk_info(replace(halves, path=tmp_path))


def test_a_trunk_that_takes_nothing_is_refused(halves: Bundle) -> None:
    graphs = [replace(graph, inputs=[]) if graph.role == GRAPH else graph for graph in halves.manifest.graphs]
    with pytest.raises(VerificationError, match="48 positions, but the graph takes no hidden states; split the bundle"):
        read_trunk_info(replace(halves, manifest=replace(halves.manifest, graphs=graphs)))


def test_a_split_bundle_still_trains_whole(halves: Bundle, data: Path, tmp_path: Path) -> None:
    result = train(halves.path, data, tmp_path / "o", options_of(steps=1))
    assert "split" not in result.plan
    assert json.loads((tmp_path / "o" / "adapter_config.json").read_text())["layers_to_transform"] is None
    assert open_trunk(halves, WHOLE) is None


def test_what_is_above_the_trunk_is_timed(halves: Bundle, data: Path) -> None:
    arguments = ["plan", str(halves.path), "--data", str(data), "--runtime", "onnxruntime", "--json"]
    above, whole = (CliRunner().invoke(main, [*arguments, "--plan", plan]) for plan in ("split", "auto"))
    assert above.exit_code == whole.exit_code == 0, above.stderr
    assert json.loads(above.stdout)["time_from"].startswith("measured here")
    device = ["--device", "raspberry-pi-5"]
    above, whole = (CliRunner().invoke(main, [*arguments, *device, "--plan", plan]) for plan in ("split", "auto"))
    seconds, of_all = (json.loads(found.stdout)["step_seconds"] for found in (above, whole))
    assert seconds < 0.9 * of_all  # by operations: one layer of two


def test_an_emulation_is_not_timed(halves: Bundle, data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Not even cut into layers: those of the trunk are not like the others."""
    for check in ("require_hls4ml", "require_compiler"):
        monkeypatch.setattr(f"edgetune.runtimes.fpga_hls.runtime.{check}", lambda: None)
    arguments = ["plan", str(halves.path), "--data", str(data), "--runtime", "fpga-hls", "--json"]
    for plan in ("auto", "split"):
        done = CliRunner().invoke(main, [*arguments, "--plan", plan])
        assert done.exit_code == 0, done.stderr
        found = json.loads(done.stdout)
        assert found["run_seconds"] is None and "simulates hardware" in found["time_from"]


def test_only_a_trunk_is_reported(halves: Bundle) -> None:
    adapter = adapter_of(halves)
    assert LayeredSession(halves, adapter, OPTIMIZER, WHOLE, OrtBackend(halves, "fp32")).placements() == []
    (placement,) = session_above(halves, upper(adapter), open_trunk(halves, ABOVE)).placements()
    assert str(placement).startswith(f"{GRAPH} 1x48: ")
    assert str(placement).endswith("on CPUExecutionProvider (no accelerator) in 1 partition, compiled now")


def test_a_provider_that_takes_no_node_is_an_error(
    halves: Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Against one that onnxruntime registers for every graph and that takes none of these operators."""
    if "AzureExecutionProvider" not in ort.get_available_providers():
        pytest.skip("this onnxruntime has no provider that takes nothing")
    monkeypatch.setattr(trunk_module, "VITIS_AI", "AzureExecutionProvider")
    with pytest.raises(MissingDependencyError, match="AzureExecutionProvider is installed but takes none of the"):
        open_trunk(opened_copy(halves, tmp_path / "bundle"), ABOVE)


class Divided:
    """A session whose graph Vitis AI shares with the CPU."""

    class Part:
        def __init__(self, provider: str, *nodes: tuple[str, str]) -> None:
            self.ep_name = provider
            self.nodes = [SimpleNamespace(op_type=operator, name=name) for operator, name in nodes]

        def get_nodes(self) -> list[SimpleNamespace]:
            return self.nodes

    def get_providers(self) -> list[str]:
        return [VITIS_AI, "CPUExecutionProvider"]

    def get_provider_graph_assignment_info(self) -> list[Divided.Part]:
        return [
            self.Part(VITIS_AI, ("MatMul", "query"), ("Add", "sum")),
            self.Part("CPUExecutionProvider", ("Softmax", "weights")),
        ]


def test_what_falls_back_from_an_accelerator_is_named() -> None:
    placement = trunk_placement(Divided(), 48)
    assert (placement.provider, placement.accelerated, placement.accelerator_partitions) == (VITIS_AI, 2, 1)
    assert placement.fallen_back == [Node("Softmax", "weights")]


def test_an_onnxruntime_that_does_not_tell_is_said() -> None:
    placement = trunk_placement(SimpleNamespace(get_providers=Divided().get_providers), 48)
    assert placement.partitions == []
    assert "this onnxruntime does not say which nodes it takes" in str(placement)


def test_vitis_ai_is_asked_with_the_documented_options(tmp_path: Path) -> None:
    """What can be tested without it: the names and that a graph has a cache of its own."""
    assert vitisai_options(tmp_path, "a" * 64, None) == {
        "cache_dir": str(tmp_path / ".cache" / "vitisai"),
        "cache_key": "a" * 32,
    }
    options = vitisai_options(tmp_path, "b" * 64, tmp_path / "vaip_config.json")
    assert options["config_file"] == str(tmp_path / "vaip_config.json")
    assert options["cacheKey"] == options["cache_key"] == "b" * 32


@pytest.fixture(autouse=True)
def nothing_is_left_in_scratch(tmp_path: Path) -> Iterator[None]:
    yield
    assert not list(tmp_path.rglob(".scratch-*"))
