"""Inputs and outputs of an ONNX file, against the onnx package."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from edgetune.errors import VerificationError
from edgetune.formats.manifest import TensorSpec
from edgetune.formats.signature import read_signature


def model(weight_bytes: int = 4096) -> onnx.ModelProto:
    weight = numpy_helper.from_array(np.arange(weight_bytes // 4, dtype=np.float32), "weight")
    graph = helper.make_graph(
        [helper.make_node("Identity", ["input_ids"], ["copy"]), helper.make_node("Identity", ["cache"], ["kept"])],
        "graph",
        [
            helper.make_tensor_value_info("input_ids", TensorProto.INT64, ["batch", "sequence"]),
            helper.make_tensor_value_info("cache", TensorProto.FLOAT16, ["batch", 2, None, 300]),
            helper.make_tensor_value_info("größe", TensorProto.BFLOAT16, []),
        ],
        [
            helper.make_tensor_value_info("copy", TensorProto.INT64, ["batch", "sequence"]),
            helper.make_tensor_value_info("kept", TensorProto.FLOAT16, None),
        ],
        initializer=[weight],
        doc_string="x" * 300,
    )
    return helper.make_model(graph, producer_name="test", opset_imports=[helper.make_opsetid("", 21)])


def by_onnx(values: object) -> list[tuple[str, int, list[int | str]]]:
    """The same facts as the onnx package reads them."""
    facts = []
    for value in values:  # type: ignore[attr-defined]
        tensor = value.type.tensor_type
        dims = [dim.dim_param or (dim.dim_value if dim.HasField("dim_value") else "?") for dim in tensor.shape.dim]
        facts.append((value.name, tensor.elem_type, dims))
    return facts


NAMES = {TensorProto.INT64: "int64", TensorProto.FLOAT16: "float16", TensorProto.BFLOAT16: "bfloat16"}


@pytest.mark.parametrize("weight_bytes", [4, 4096, 3_000_000])
def test_agrees_with_the_onnx_package(tmp_path: Path, weight_bytes: int) -> None:
    path = tmp_path / "model.onnx"
    onnx.save(model(weight_bytes), path)
    loaded = onnx.load(path).graph
    signature = read_signature(path)
    assert [(spec.name, spec.dtype, spec.shape) for spec in signature.inputs] == [
        (name, NAMES[code], dims) for name, code, dims in by_onnx(loaded.input)
    ]
    assert [(spec.name, spec.dtype, spec.shape) for spec in signature.outputs] == [
        (name, NAMES[code], dims) for name, code, dims in by_onnx(loaded.output)
    ]
    assert signature.inputs[1] == TensorSpec("cache", "float16", ["batch", 2, "?", 300])


def test_every_data_type_of_onnx_is_named(tmp_path: Path) -> None:
    for name, code in TensorProto.DataType.items():
        if name in ("UNDEFINED", "COMPLEX64", "COMPLEX128") or name.startswith("FLOAT8") or code > TensorProto.INT4:
            continue
        value = helper.make_tensor_value_info("x", code, [1])
        graph = helper.make_graph([helper.make_node("Identity", ["x"], ["x2"])], "g", [value], [value])
        onnx.save(helper.make_model(graph), tmp_path / "model.onnx")
        assert read_signature(tmp_path / "model.onnx").inputs[0].dtype == name.lower()


@pytest.mark.parametrize("cut", [0, 1, 10, 100, 1000, -1])
def test_a_cut_file_is_refused(tmp_path: Path, cut: int) -> None:
    path = tmp_path / "model.onnx"
    path.write_bytes(model().SerializeToString()[:cut])
    with pytest.raises(VerificationError, match=r"model\.onnx: not a readable ONNX model"):
        read_signature(path)


@pytest.mark.parametrize("data", [b"\xff" * 40, b"not a model at all", b"\x3a\xff\xff\xff\xff\xff\xff\xff\xff\x7f"])
def test_other_bytes_are_refused(tmp_path: Path, data: bytes) -> None:
    path = tmp_path / "model.onnx"
    path.write_bytes(data)
    with pytest.raises(VerificationError):
        read_signature(path)


def test_random_changes_never_do_worse_than_a_refusal(tmp_path: Path) -> None:
    data = bytearray(model().SerializeToString())
    generator = np.random.default_rng(0)
    path = tmp_path / "model.onnx"
    for _ in range(300):
        changed = bytearray(data)
        for position in generator.integers(0, len(data), 3):
            changed[position] = generator.integers(0, 256)
        path.write_bytes(changed)
        try:
            read_signature(path)
        except VerificationError:
            continue
