"""The portable graphs have the form that accelerators take."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from numpy.typing import NDArray
from onnx import numpy_helper

from edgetune.config import Base
from edgetune.data.batches import make_batch
from edgetune.data.encode import Example
from edgetune.formats.bundle import Bundle
from edgetune.formats.roles import HALF_LOSS, HALF_STEP
from edgetune.model.lora import initial_parameters
from support.prepared_bundles import Prepared
from support.tiny_phi3 import VARIANTS, lora

ROLES = ["step", "loss", HALF_STEP, HALF_LOSS]
SIZES = [(1, 8), (3, 40)]
OTHERS = [("partial", "fp32"), ("multi-head", "int8"), ("grouped-query", "fp16")]
CASES = [*((variant, "int4") for variant in VARIANTS), *OTHERS]
UNWELCOME = {
    "Trilu", "Erf", "ReduceSumSquare", "ScatterElements", "ScatterND", "IsNaN", "IsInf", "Range", "Sin", "Cos", "Pad",
    "Shape", "Size", "ConstantOfShape", "NonZero", "If", "Loop", "Scan",
}  # fmt: skip
"""What splits the graph on an NPU, or computes shapes."""
SHAPE_PARAMETERS = {"Reshape", "Expand", "Slice", "Split", "Squeeze", "Unsqueeze", "ReduceSum", "ReduceMean"}

each_graph = pytest.mark.parametrize("role", ROLES)
each_bundle = pytest.mark.parametrize(("variant", "base"), CASES)


def load(bundle: Bundle, role: str) -> onnx.ModelProto:
    return onnx.load(bundle.file(role), load_external_data=False)


def constants(model: onnx.ModelProto) -> dict[str, onnx.TensorProto]:
    """Small constants, wherever they are kept."""
    inside = {tensor.name: tensor for tensor in model.graph.initializer if not tensor.external_data}
    nodes = [node for node in model.graph.node if node.op_type == "Constant"]
    return inside | {node.output[0]: node.attribute[0].t for node in nodes}


def batch_of(bundle: Bundle, rows: int, length: int) -> dict[str, NDArray[np.generic]]:
    generator = np.random.default_rng(length)
    architecture = bundle.manifest.architecture
    examples = []
    for row in range(rows):
        # The first row decides the length, the others are padded.
        ids = generator.integers(3, architecture.vocab_size, length - 3 * row).tolist()
        examples.append(Example(row, ids, [-100, *ids[1:]]))
    return make_batch(examples, architecture.rope, 2).tensors()


@each_graph
@each_bundle
def test_is_standard_onnx(prepared: Prepared, variant: str, base: Base, role: str) -> None:
    bundle = prepared(variant, base)
    model = load(bundle, role)
    assert model.ir_version == 10
    assert [(opset.domain, opset.version) for opset in model.opset_import] == [("", 21)]
    assert not model.functions
    for node in model.graph.node:
        assert node.domain == ""
        assert not onnx.defs.get_schema(node.op_type, 21).deprecated
        assert node.op_type not in UNWELCOME, node.name
    onnx.checker.check_model(str(bundle.file(role)), full_check=True)


@each_graph
@each_bundle
def test_constants_are_finite_and_not_empty(prepared: Prepared, variant: str, base: Base, role: str) -> None:
    model = load(prepared(variant, base), role)
    for name, tensor in constants(model).items():
        assert math.prod(tensor.dims) > 0, name
        if tensor.data_type == onnx.TensorProto.FLOAT:
            assert np.isfinite(numpy_helper.to_array(tensor)).all(), name


@each_graph
@each_bundle
def test_every_shape_is_known_before_the_graph_runs(prepared: Prepared, variant: str, base: Base, role: str) -> None:
    model = load(prepared(variant, base), role)
    known = {*constants(model), ""}
    for node in model.graph.node:
        if node.op_type in SHAPE_PARAMETERS:
            assert set(node.input[1:]) <= known, node.name


@pytest.mark.parametrize("size", SIZES)
@each_graph
@each_bundle
def test_static_shapes_are_neither_scalar_nor_empty(
    prepared: Prepared, variant: str, base: Base, role: str, size: tuple[int, int]
) -> None:
    model = load(prepared(variant, base), role)
    sizes = dict(zip(("batch", "sequence"), size, strict=True))
    del model.graph.value_info[:]
    for value in [*model.graph.input, *model.graph.output]:
        for dim in value.type.tensor_type.shape.dim:
            if dim.dim_param:
                dim.dim_value = sizes[dim.dim_param]
    inferred = onnx.shape_inference.infer_shapes(model, strict_mode=True, data_prop=True).graph
    shapes = {value.name: value.type.tensor_type.shape.dim for value in [*inferred.value_info, *inferred.output]}
    for node in model.graph.node:
        for name in filter(None, node.output):
            assert len(shapes[name]) > 0, f"{name} is a scalar"
            assert all(dim.dim_value > 0 for dim in shapes[name]), f"{name} is empty or of unknown size"


@pytest.mark.own
@pytest.mark.parametrize("size", SIZES)
@each_graph
@each_bundle
def test_runs_with_static_dimensions_as_with_symbolic_ones(
    prepared: Prepared, variant: str, base: Base, role: str, size: tuple[int, int], tmp_path: Path
) -> None:
    bundle = prepared(variant, base)
    feed = batch_of(bundle, *size) | dict(initial_parameters(lora(variant), seed=0))
    if role in ("step", HALF_STEP):
        feed["loss_scale"] = np.ones(1, np.float32)
    symbolic = ort.InferenceSession(bundle.file(role), providers=["CPUExecutionProvider"])
    options = ort.SessionOptions()
    options.add_free_dimension_override_by_name("batch", size[0])
    options.add_free_dimension_override_by_name("sequence", size[1])
    options.optimized_model_filepath = str(tmp_path / "optimised.onnx")
    options.log_severity_level = 3  # it warns that such a file is for this machine alone
    static = ort.InferenceSession(bundle.file(role), options, providers=["CPUExecutionProvider"])
    optimised = onnx.load(options.optimized_model_filepath, load_external_data=False).graph
    assert not {node.op_type for node in optimised.node} & UNWELCOME
    assert all(len(output.shape) > 0 for output in static.get_outputs())
    names = [output.name for output in static.get_outputs()]
    for name, found, expected in zip(names, static.run(names, feed), symbolic.run(names, feed), strict=True):
        assert np.isfinite(found).all(), name
        np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-6, err_msg=name)


@each_bundle
def test_contract(prepared: Prepared, variant: str, base: Base) -> None:
    bundle = prepared(variant, base)
    rotated = 16 if variant == "partial" else 32
    rows = ["batch", "sequence"]
    given: dict[str, tuple[str, list[int | str]]] = {
        "input_ids": ("int64", rows),
        "labels": ("int64", rows),
        "attn_bias": ("float", ["batch", 1, "sequence", "sequence"]),
        "rope_cos": ("float", [*rows, rotated]),
        "rope_sin": ("float", [*rows, rotated]),
    }
    slots = {name: ("float", list(shape)) for name, shape in lora(variant).shapes().items()}
    gradients = {f"{name}.grad": described for name, described in slots.items()}
    loss = {"loss": ("float", [1])}
    step, evaluation = bundle.manifest.graph("step"), bundle.manifest.graph("loss")
    assert {t.name: (t.dtype, t.shape) for t in step.inputs} == given | {"loss_scale": ("float", [1])} | slots
    assert {t.name: (t.dtype, t.shape) for t in step.outputs} == loss | gradients
    assert {t.name: (t.dtype, t.shape) for t in evaluation.inputs} == given | slots
    assert {t.name: (t.dtype, t.shape) for t in evaluation.outputs} == loss | {"predictions": ("int64", rows)}
    assert [t.name for t in step.outputs][1:] == [f"{name}.grad" for name in bundle.manifest.lora.shapes()]
    for graph, half in ((step, HALF_STEP), (evaluation, HALF_LOSS)):
        assert bundle.manifest.graph(half) == replace(graph, role=half, file=f"{half}.onnx")


@each_bundle
def test_the_norms_for_float16_alone_look_for_the_largest_magnitude(
    prepared: Prepared, variant: str, base: Base
) -> None:
    """In bfloat16 each of their operators rounds: what computes in it has norms that square at once."""
    bundle = prepared(variant, base)
    norms = 2 * bundle.manifest.architecture.num_hidden_layers + 1
    found = {role: [node.op_type for node in load(bundle, role).graph.node].count("ReduceMax") for role in ROLES}
    assert found == {"step": 0, "loss": 0, HALF_STEP: norms, HALF_LOSS: norms}
