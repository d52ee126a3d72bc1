"""The runtime `openvino`: gradients against PyTorch + PEFT, its cache, and that it keeps to itself."""

from __future__ import annotations

import json
import subprocess
import sys
from collections import Counter
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import get_args

import numpy as np
import pytest

from edgetune.config import Base, DeviceType
from edgetune.errors import IncompatibleError, MissingDependencyError
from edgetune.formats import layered_graphs as pieces
from edgetune.formats.bundle import load_bundle
from edgetune.formats.frozen_weights import FrozenWeights
from edgetune.formats.roles import INT8, SCALES
from edgetune.model.pieces import Pieces
from edgetune.model.rotation import rotated_weight
from edgetune.runtimes import find_runtime, openvino, openvino_core
from edgetune.runtimes import onnxruntime as stock
from edgetune.runtimes.execution import Accelerator, ExecutionPlan, LayeredPlan, Precision, WholePlan
from edgetune.runtimes.layered.channels import Channels, groups_of
from edgetune.runtimes.layered.onnxruntime.backend import OrtBackend
from edgetune.runtimes.openvino_core import core, has_bfloat16
from edgetune.runtimes.whole import compiled as graphs
from edgetune.runtimes.whole.contexts import ContextKey, ContextStore
from support import oracle
from support.bundle_copy import copy_of_bundle
from support.oracle import relative
from support.prepared_bundles import InPieces, Prepared, each_bundle
from support.random_rows import lengths_of, rows_of
from support.tiny_phi3 import checkpoint
from support.tiny_step import LEARNING_RATE, OPTIMIZER, adapter_of, batch_of

installed = pytest.mark.skipif(find_spec("openvino") is None, reason="openvino is not installed")
RECOMPUTE = LayeredPlan(kept_layers=0, resident=False, head_rows=16, head_tokens=100)
KEEP = LayeredPlan(kept_layers=2, resident=True, head_rows=1024)
PLANS = {
    "recompute": RECOMPUTE,
    "keep": KEEP,
    "int8 recompute": replace(RECOMPUTE, precision="int8"),
    "int8 keep": replace(KEEP, precision="int8"),
}
BF16_COSINE, BF16_LOSS, FP32_ERROR = 0.997, 2e-3, 1e-3
INT8_COSINE, INT8_LOSS = 0.985, 5e-3
"""The cosine is that of models 64 channels wide, where bfloat16 alone comes to 0.9976; `make bench` has larger ones."""
PROJECTION = "model.layers.1.mlp.down_proj.weight"


@installed
@pytest.mark.parametrize("name", PLANS)
@each_bundle
def test_loss_and_gradients_are_pytorchs(prepared: Prepared, variant: str, base: Base, name: str) -> None:
    bundle = prepared(variant, base)
    plan = PLANS[name]
    int8 = plan.precision == "int8"
    if int8 and openvino.abilities().int8 is None:
        pytest.skip("the processor has no bfloat16")
    precision = INT8_LOSS if int8 else BF16_LOSS
    parameters = adapter_of(bundle)
    rows = rows_of(1, lengths_of(variant, 1))
    model = oracle.peft_model(checkpoint(variant), bundle, parameters)
    loss = oracle.loss(model, rows)
    loss.backward()
    exact = openvino.abilities().exact
    assert exact is not None
    with openvino.open_session(bundle, parameters, OPTIMIZER, plan) as session:
        assert session.evaluate(batch_of(bundle, rows)) == pytest.approx(loss.item(), rel=precision)
        result = session.step([batch_of(bundle, rows)], LEARNING_RATE)
        found = session.gradients()  # type: ignore[attr-defined]
    assert result.loss == pytest.approx(loss.item(), rel=precision)
    for name, parameter in oracle.trainable(model).items():
        assert parameter.grad is not None
        expected = parameter.grad.numpy()
        if exact.precision == "fp32":
            assert relative(found[name], expected) <= FP32_ERROR, name
        else:
            assert oracle.cosine(found[name], expected) >= (INT8_COSINE if int8 else BF16_COSINE), name
            assert np.linalg.norm(found[name]) == pytest.approx(np.linalg.norm(expected), rel=0.03), name


@pytest.mark.own
@installed
@pytest.mark.parametrize("plan", [KEEP, RECOMPUTE], ids=["keep", "recompute"])
def test_exact_layers_have_the_exact_plans_loss(prepared: Prepared, plan: ExecutionPlan) -> None:
    exact = openvino.abilities().exact
    assert exact is not None
    if openvino.abilities().int8 is None:
        pytest.skip("the processor has no bfloat16")
    bundle = prepared("grouped-query", "int4")
    batch = batch_of(bundle, rows_of(1, [17, 23]))
    int8 = replace(plan, precision="int8")
    losses = []
    for chosen in (replace(plan, precision=exact.precision), replace(int8, exact_layers=2), int8):
        with openvino.open_session(bundle, adapter_of(bundle), OPTIMIZER, chosen) as session:
            losses.append(session.step([batch], LEARNING_RATE).loss)
    assert losses[1] == losses[0] != losses[2]


@installed
@pytest.mark.parametrize("role", ["attention_grad_kept", "mlp_grad"])
def test_gains_leave_a_backward_graph_in_bfloat16(prepared: Prepared, with_dora: Prepared, role: str) -> None:
    """What is elementwise in it is computed as it is without gains, and nothing is converted on the way."""
    if not has_bfloat16():
        pytest.skip("the processor has no bfloat16")
    from edgetune.runtimes.layered.openvino.backend import OpenVinoBackend

    backend = OpenVinoBackend(core(), "CPU", None, KEEP, Channels())
    kinds = []
    for make in (prepared, with_dora):
        graph = backend.load(make("grouped-query", "fp32").file(f"layers/{role}"))
        sizes = {value.any_name: value.partial_shape for value in graph._model.inputs}
        shapes = tuple(tuple(s.get_length() if s.is_static else 24 for s in sizes[name]) for name in graph.inputs)
        infos = [node.get_rt_info() for node in graph._compile(graph._of_shapes(shapes)).get_runtime_model().get_ops()]
        kinds.append(Counter(f"{i['layerType'].astype(str)} {i['runtimePrecision'].astype(str)}" for i in infos))
    without, found = kinds
    assert without["Subgraph bf16"] > 0
    assert found["Convert bf16"] == 0
    # Of one gain it is the incoming gradient and the kept result that are multiplied: neither is a product's.
    assert found["Subgraph f32"] <= without["Subgraph f32"] + 1


@installed
@pytest.mark.parametrize("wide", [False, True], ids=["narrow", "wide"])
@pytest.mark.parametrize("precision", ["bf16", "int8"])
def test_pieces_whose_channels_are_not_in_turn_add_up(precision: Precision, wide: bool, in_pieces: InPieces) -> None:
    """Streamed weights have even channels first, within the smaller pieces and within a head."""
    bundle = in_pieces("grouped-query")
    assert pieces.pieces_of(bundle.manifest, wide=wide) == (Pieces(1, 2) if wide else Pieces(2, 6))
    plan = replace(RECOMPUTE, precision=precision, wide=wide)
    groups = groups_of(bundle.manifest)
    assert groups is not None
    assert groups.inner < groups.hidden
    parameters = adapter_of(bundle)
    rows = rows_of(1, lengths_of("grouped-query", 1))
    model = oracle.peft_model(checkpoint("grouped-query"), bundle, parameters)
    oracle.loss(model, rows).backward()
    with openvino.open_session(bundle, parameters, OPTIMIZER, plan) as session:
        np.testing.assert_equal(session.adapter(), dict(parameters))
        session.step([batch_of(bundle, rows)], LEARNING_RATE)
        gradients = session.gradients()  # type: ignore[attr-defined]
    for name, parameter in oracle.trainable(model).items():
        assert parameter.grad is not None
        assert oracle.cosine(gradients[name], parameter.grad.numpy()) >= INT8_COSINE, name


@installed
@pytest.mark.parametrize("group", [0, 32, 96], ids=["own order", "groups of 32", "groups of 96"])
@pytest.mark.parametrize("columns", [None, (64, 160)], ids=["whole", "part"])
@pytest.mark.parametrize("base", get_args(Base))
def test_weights_are_rounded_to_a_step(
    prepared: Prepared, base: Base, columns: tuple[int, int] | None, group: int
) -> None:
    shared = core()
    from edgetune.runtimes.layered.openvino.backend import OpenVinoBackend

    bundle = prepared("grouped-query", base)
    block = FrozenWeights(bundle.path, bundle.manifest.architecture).linear(PROJECTION, columns=columns)
    expected = OrtBackend(bundle, "fp32").weight("", block, np.empty)[""]
    if group and base == "int4":
        block = replace(block, group=group)
        order = np.arange(expected.shape[1]).reshape(-1, group // 2, 2).swapaxes(1, 2).ravel()
        expected = expected[:, order]
    exact = OpenVinoBackend(shared, "CPU", None, KEEP, Channels())
    np.testing.assert_allclose(exact.restore(exact.weight("", block, np.empty)[""]), expected, rtol=2**-8)
    int8 = OpenVinoBackend(shared, "CPU", None, replace(KEEP, precision="int8"), Channels())
    found = int8.weight(INT8, block, np.empty)
    weight, scales = found[""], found[SCALES]
    assert (weight.dtype, weight.shape, scales.shape) == (np.int8, expected.shape, expected.shape[:1])
    errors = (weight * scales[:, None] - rotated_weight(expected)) / scales[:, None]
    # Half a step, and what bfloat16 rounds of the largest numbers.
    assert np.abs(errors).max() <= 1
    assert np.sqrt((errors**2).mean()) <= 0.32
    assert np.abs(weight.astype(np.int32)).max(axis=1).min() >= 126, "all of the 127 steps are used"
    again = int8.weight(INT8, block, np.empty, scales)
    np.testing.assert_array_equal(again[""], weight)
    assert again[SCALES] is scales


@installed
@pytest.mark.parametrize("width", [96, 576])
def test_int8_products_keep_what_is_beside_an_enormous_number(width: int) -> None:
    """Forward and backward, against float64; the enormous number meets weights of zero: it is not in the sum."""
    from openvino import Model, Type
    from openvino import opset13 as op

    from edgetune.model.blocks import Block
    from edgetune.runtimes.layered.openvino.backend import OpenVinoBackend
    from edgetune.runtimes.layered.openvino.products import Products

    generator = np.random.default_rng(0)
    shapes = ((1, 40, width), (1, 40, 128), (128, width))
    x, dy, weight = (generator.standard_normal(shape).astype(np.float32) for shape in shapes)
    x[..., 7], weight[:, 7] = 50, 0
    shared = core()
    if "BF16" not in shared.get_property("CPU", "OPTIMIZATION_CAPABILITIES"):
        pytest.skip("the processor has no bfloat16")
    rows, gradient, matrix = (op.parameter(list(array.shape), Type.f32) for array in (x, dy, weight))
    matrix.output(0).set_names({"q_proj.weight"})
    products = [op.matmul(rows, matrix, False, True), op.matmul(gradient, matrix, False, False)]
    model = Model(products, [rows, gradient, matrix])
    Products(int8=True, short=True).adapt(model)
    backend = OpenVinoBackend(shared, "CPU", None, replace(KEEP, precision="int8"), Channels())
    made = backend.weight(INT8, Block(weight, None), np.empty)
    compiled = shared.compile_model(model, "CPU", {"INFERENCE_PRECISION_HINT": Type.bf16})
    forward, backward = compiled([x, dy, made[""], made[SCALES]]).to_tuple()
    exact = weight.astype(np.float64)
    assert relative(forward, x @ exact.T) <= 0.06
    assert relative(backward, dy @ exact) <= 0.02


@installed
def test_compiled_models_are_kept_beside_a_bundle_that_still_verifies(prepared: Prepared, tmp_path: Path) -> None:
    folder = copy_of_bundle(prepared("multi-head", "int4").path, tmp_path / "bundle")
    bundle = load_bundle(folder)
    batch = batch_of(bundle, rows_of(0, [9, 12]))
    losses = []
    before: dict[Path, int] = {}
    for attempt in range(3):
        with openvino.open_session(bundle, adapter_of(bundle), OPTIMIZER, KEEP) as session:
            losses.append(session.step([batch], LEARNING_RATE).loss)
        (cache,) = (folder / ".cache").iterdir()
        blobs = {path: path.stat().st_mtime_ns for path in cache.glob("*.blob")}
        if attempt == 1:
            assert before.items() <= blobs.items(), "what is there is not compiled again"
            damaged = min(before)
            data = bytearray(damaged.read_bytes())
            data[len(data) // 2] ^= 1
            damaged.write_bytes(data)
        before = blobs
    assert openvino.version().replace(" ", "-") in cache.name
    # Compiled again, it may have another name.
    assert not damaged.exists() or damaged.read_bytes() != bytes(data), "what was damaged is not used"
    assert losses[0] == losses[1] == losses[2]
    load_bundle(folder)


@installed
def test_a_second_training_leaves_the_first_ones_cache_alone(prepared: Prepared, tmp_path: Path) -> None:
    folder = copy_of_bundle(prepared("multi-head", "int4").path, tmp_path / "bundle")
    bundle = load_bundle(folder)
    batch, other = (batch_of(bundle, rows_of(0, [length])) for length in (9, 40))
    with openvino.open_session(bundle, adapter_of(bundle), OPTIMIZER, KEEP) as first:
        expected = first.step([batch], LEARNING_RATE)
        compiled = set(folder.rglob("*.blob"))
        with openvino.open_session(bundle, adapter_of(bundle), OPTIMIZER, KEEP) as second:
            assert second.step([batch], LEARNING_RATE) == expected
            second.step([other], LEARNING_RATE)
        assert set(folder.rglob("*.blob")) == compiled != set()
    with openvino.open_session(bundle, adapter_of(bundle), OPTIMIZER, KEEP):
        assert set(folder.rglob("*.blob")) == compiled


@installed
def test_a_compiled_whole_step_is_kept_and_verified(prepared: Prepared, tmp_path: Path) -> None:
    folder = copy_of_bundle(prepared("multi-head", "int4").path, tmp_path / "bundle")
    bundle = load_bundle(folder)
    batch = batch_of(bundle, rows_of(0, [9]))
    placements, results = [], []
    for attempt in range(3):
        with openvino.open_session(bundle, adapter_of(bundle), OPTIMIZER, WholePlan()) as session:
            results.append(session.step([batch], LEARNING_RATE))
            placements += session.placements()  # type: ignore[attr-defined]
        if attempt == 1:
            (compiled,) = folder.glob(".cache/contexts/*/compiled")
            compiled.write_bytes(compiled.read_bytes()[:-1] + b"?")
    assert [placement.cached for placement in placements] == [False, True, False]
    assert placements[0].accelerated > 300
    assert placements[1] == replace(placements[0], cached=True)
    assert placements[0].device.startswith("CPU, ")
    assert results[0] == results[1] == results[2]


@installed
def test_a_compiled_whole_step_is_taken_without_reading_the_graph(prepared: Prepared, tmp_path: Path) -> None:
    """Nor are its weights unpacked again."""
    folder = copy_of_bundle(prepared("multi-head", "int4").path, tmp_path / "bundle")
    bundle = load_bundle(folder)
    batch = batch_of(bundle, rows_of(0, [9]))
    with openvino.open_session(bundle, adapter_of(bundle), OPTIMIZER, WholePlan()) as session:
        expected = session.step([batch], LEARNING_RATE)
    bundle.file("step").unlink()
    with openvino.open_session(bundle, adapter_of(bundle), OPTIMIZER, WholePlan()) as session:
        assert session.step([batch], LEARNING_RATE) == expected


@installed
def test_a_compiled_whole_step_that_no_longer_loads_is_compiled_again(prepared: Prepared, tmp_path: Path) -> None:
    """Its hash is right, as when a driver has changed."""
    folder = copy_of_bundle(prepared("multi-head", "int4").path, tmp_path / "bundle")
    bundle = load_bundle(folder)
    openvino.place(bundle, WholePlan(), 1, 8)
    for path in folder.glob(".cache/contexts/*/record.json"):
        key = ContextKey(**json.loads(path.read_text())["key"])
        ContextStore(folder).save(key, b"of another driver", [])
    found = [openvino.place(bundle, WholePlan(), 1, 8) for _ in range(2)]
    assert [[placement.cached for placement in placements] for placements in found] == [[False] * 2, [True] * 2]


@installed
def test_the_shape_that_was_not_used_for_longest_makes_room(
    prepared: Prepared, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(graphs, "_MOST_GRAPHS", 2)
    bundle = prepared("multi-head", "int4")
    with openvino.open_session(bundle, adapter_of(bundle), OPTIMIZER, WholePlan()) as session:
        for length in (8, 16, 8, 24):
            session.evaluate(batch_of(bundle, rows_of(0, [length])))
        assert [length for _, _, length in session._graphs._graphs] == [8, 24]  # type: ignore[attr-defined]


@pytest.mark.own
@installed
@each_bundle
def test_the_whole_step_follows_the_cpu(prepared: Prepared, variant: str, base: Base) -> None:
    bundle = prepared(variant, base)
    parameters = adapter_of(bundle)
    batch = batch_of(bundle, rows_of(1, [17, 23]))
    exact = "BF16" not in core().get_property("CPU", "OPTIMIZATION_CAPABILITIES")
    with stock.open_session(bundle, parameters, OPTIMIZER, WholePlan()) as reference:
        expected = reference.step([batch], LEARNING_RATE)
        gradients = reference.gradients()  # type: ignore[attr-defined]
    with openvino.open_session(bundle, parameters, OPTIMIZER, WholePlan()) as session:
        result = session.step([batch], LEARNING_RATE)
        found = session.gradients()  # type: ignore[attr-defined]
        (placement,) = session.placements()  # type: ignore[attr-defined]
    assert (placement.accelerator_partitions, placement.fallen_back) == (1, [])
    assert result.loss == pytest.approx(expected.loss, rel=BF16_LOSS)
    for name, gradient in gradients.items():
        assert oracle.cosine(found[name], gradient) >= (1 - 1e-6 if exact else BF16_COSINE), name
        assert np.linalg.norm(found[name]) == pytest.approx(np.linalg.norm(gradient), rel=0.03), name


@installed
@pytest.mark.parametrize("device", ["NPU", "GPU"])
def test_a_device_that_is_not_there_is_named(prepared: Prepared, device: DeviceType) -> None:
    if any(name.startswith(device) for name in core().available_devices):
        pytest.skip(f"there is a {device} here")
    bundle = prepared("multi-head", "int4")
    plan = WholePlan(accelerator=Accelerator(device))
    with (
        pytest.raises(IncompatibleError, match=f"finds no {device} here, only CPU"),
        openvino.open_session(bundle, adapter_of(bundle), OPTIMIZER, plan),
    ):
        pass


@installed
def test_a_refusal_without_words_is_named_by_its_kind(prepared: Prepared, monkeypatch: pytest.MonkeyPatch) -> None:
    from edgetune.runtimes.whole.openvino_compiler import OpenVinoCompiler

    def refuse(*_: object) -> None:
        raise RuntimeError

    monkeypatch.setattr(OpenVinoCompiler, "_compile", refuse)
    with pytest.raises(IncompatibleError, match=r"cannot compile the graph 'step' \(RuntimeError\); train with"):
        openvino.place(prepared("multi-head", "int4"), WholePlan(), 1, 8)


@installed
def test_the_cpu_is_no_npu(prepared: Prepared) -> None:
    bundle = prepared("multi-head", "int4")
    plan = WholePlan(accelerator=Accelerator(require=True))
    with (
        pytest.raises(IncompatibleError, match="--require-npu asks for an NPU"),
        openvino.open_session(bundle, adapter_of(bundle), OPTIMIZER, plan),
    ):
        pass


@installed
def test_the_import_starts_nothing_and_tells_nobody() -> None:
    """OpenVINO's converter reports its own import, in a process of its own; it is not imported."""
    program = """
import multiprocessing, socket, subprocess, sys
def refuse(*arguments, **options):
    raise SystemExit("something was started")
subprocess.Popen.__init__ = multiprocessing.Process.start = socket.socket.connect = refuse
from edgetune.runtimes import openvino
openvino.abilities()
openvino.has_device("NPU")
import edgetune.runtimes.whole.openvino_compiler
import edgetune.runtimes.layered.openvino.backend
assert "openvino" in sys.modules
assert "openvino_telemetry" not in sys.modules
assert "openvino.tools.ovc" not in sys.modules
"""
    finished = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert (finished.returncode, finished.stderr) == (0, "")


@installed
def test_the_backend_does_not_import_the_runtime_that_imports_it() -> None:
    program = """
import sys
from edgetune.runtimes.openvino_core import core
core()
import edgetune.runtimes.layered.openvino.backend
assert "edgetune.runtimes.openvino" not in sys.modules
"""
    finished = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert (finished.returncode, finished.stderr) == (0, "")


def test_a_missing_package_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    openvino_core.core.cache_clear()
    monkeypatch.setattr(openvino_core, "find_spec", lambda name: None)
    with pytest.raises(MissingDependencyError, match=r'pip install "edgetune\[openvino\]"'):
        find_runtime("openvino").abilities()


def test_the_processors_flags_say_what_openvino_says() -> None:
    assert has_bfloat16() == ("BF16" in core().get_property("CPU", "OPTIMIZATION_CAPABILITIES"))


def test_to_choose_another_runtime_does_not_load_openvino(prepared: Prepared) -> None:
    """It would take memory that the plan was not given."""
    code = (
        "import sys\n"
        "from edgetune.cli import main\n"
        "try:\n    main()\n"
        "finally:\n    print({'openvino', 'hls4ml', 'onnxruntime_qnn'} & sys.modules.keys(), file=sys.stderr)\n"
    )
    bundle = prepared("grouped-query", "int4").path
    words = ["plan", bundle, "--length", "32", "--steps", "1", "--memory-budget", "120MB", "--json"]
    done = subprocess.run([sys.executable, "-c", code, *map(str, words)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["runtime"] == "onnxruntime"
    assert done.stderr.splitlines()[-1] == "set()"
