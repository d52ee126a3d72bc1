"""Vitis AI's rules: a graph that keeps them, and one that breaks each."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest
from click.testing import CliRunner
from onnx import TensorProto, helper, numpy_helper

from edgetune.cli import main
from edgetune.errors import IncompatibleError, UsageError, VerificationError
from edgetune.split.conformance import RULES, check_file, require_conformance

Change = Callable[[onnx.ModelProto], None]


def good() -> onnx.ModelProto:
    """One int8 product and a Sigmoid."""
    arrays = {
        "w": np.ones((8, 4), np.int8),
        "zero": np.array(0, np.int8),
        **{f"s_{name}": np.array(scale, np.float32) for name, scale in (("x", 2**-4), ("w", 2**-7), ("y", 2**-2))},
    }
    nodes = [
        helper.make_node("QuantizeLinear", ["x", "s_x", "zero"], ["x_q"], "quantise_x"),
        helper.make_node("DequantizeLinear", ["x_q", "s_x", "zero"], ["x_d"], "dequantise_x"),
        helper.make_node("DequantizeLinear", ["w", "s_w", "zero"], ["w_d"], "dequantise_w"),
        helper.make_node("MatMul", ["x_d", "w_d"], ["y"], "product"),
        helper.make_node("QuantizeLinear", ["y", "s_y", "zero"], ["y_q"], "quantise_y"),
        helper.make_node("DequantizeLinear", ["y_q", "s_y", "zero"], ["y_d"], "dequantise_y"),
        helper.make_node("Sigmoid", ["y_d"], ["out"], "sigmoid"),
    ]
    graph = helper.make_graph(
        nodes,
        "good",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, [1, 3, 8])],
        [helper.make_tensor_value_info("out", TensorProto.FLOAT, [1, 3, 4])],
        [numpy_helper.from_array(array, name) for name, array in arrays.items()],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)


def _replace(model: onnx.ModelProto, name: str, array: np.ndarray) -> None:
    (tensor,) = (tensor for tensor in model.graph.initializer if tensor.name == name)
    tensor.CopyFrom(numpy_helper.from_array(array, name))


def newer(model: onnx.ModelProto) -> None:
    model.opset_import[0].version = 21


def foreign(model: onnx.ModelProto) -> None:
    model.graph.node[-1].op_type, model.graph.node[-1].domain = "QuickGelu", "com.microsoft"
    model.opset_import.append(helper.make_opsetid("com.microsoft", 1))
    model.graph.value_info.append(helper.make_tensor_value_info("out", TensorProto.FLOAT, [1, 3, 4]))


def unknown(model: onnx.ModelProto) -> None:
    model.graph.node[-1].op_type = "Softplus"


def symbolic(model: onnx.ModelProto) -> None:
    model.graph.input[0].type.tensor_type.shape.dim[1].dim_param = "sequence"
    model.graph.output[0].type.tensor_type.shape.dim[1].dim_param = "sequence"


def empty(model: onnx.ModelProto) -> None:
    for value in (model.graph.input[0], model.graph.output[0]):
        value.type.tensor_type.shape.dim[1].dim_value = 0


def double(model: onnx.ModelProto) -> None:
    model.graph.node.append(helper.make_node("Cast", ["out"], ["wide"], "widen", to=TensorProto.DOUBLE))
    model.graph.output.append(helper.make_tensor_value_info("wide", TensorProto.DOUBLE, [1, 3, 4]))


def asymmetric(model: onnx.ModelProto) -> None:
    _replace(model, "zero", np.array(3, np.int8))


def unsigned(model: onnx.ModelProto) -> None:
    _replace(model, "zero", np.array(0, np.uint8))
    _replace(model, "w", np.ones((8, 4), np.uint8))


def without_zero(model: onnx.ModelProto) -> None:
    del model.graph.node[2].input[2]


def crooked(model: onnx.ModelProto) -> None:
    _replace(model, "s_y", np.array(0.1, np.float32))


def per_channel(model: onnx.ModelProto) -> None:
    _replace(model, "s_w", np.full(4, 2**-7, np.float32))
    model.graph.initializer.append(numpy_helper.from_array(np.zeros(4, np.int8), "zeros"))
    model.graph.node[2].input[2] = "zeros"
    model.graph.node[2].attribute.append(helper.make_attribute("axis", 1))


def float_weight(model: onnx.ModelProto) -> None:
    model.graph.initializer.append(numpy_helper.from_array(np.ones((8, 4), np.float32), "float_w"))
    model.graph.node[3].input[1] = "float_w"


def float_result(model: onnx.ModelProto) -> None:
    model.graph.node[-1].input[0] = "y"
    del model.graph.node[4:6]


BREAKS: dict[Change, tuple[str, int, str]] = {
    newer: ("opset", 1, "the graph: is of opset 21; expected 17 at most"),
    foreign: ("domain", 1, "sigmoid: is com.microsoft.QuickGelu; expected standard ONNX"),
    unknown: ("operator", 1, "sigmoid: is Softplus, which is not among those for INT8"),
    symbolic: ("static shape", 7, "x: is [1, sequence, 8]; expected numbers only"),
    empty: ("static shape", 7, "x: is [1, 0, 8]; expected no dimension of size 0"),
    double: ("type", 1, "wide: is DOUBLE; expected FLOAT, INT8, or INT64 for shapes"),
    asymmetric: ("symmetric int8", 5, "quantise_x: has zero point [3] of int8; expected int8 zero"),
    unsigned: ("symmetric int8", 5, "quantise_x: has zero point [0] of uint8; expected int8 zero"),
    without_zero: ("symmetric int8", 1, "dequantise_w: has no constant zero point; expected int8 zero"),
    crooked: ("scale", 2, "quantise_y: has scale 0.1; expected a power of two"),
    per_channel: ("scale", 1, "dequantise_w: has 4 scales; expected one for the whole tensor"),
    float_weight: ("int8 product", 1, "product: takes float_w in float; expected int8 behind it"),
    float_result: ("int8 product", 1, "product: gives float; expected QuantizeLinear behind it"),
}


def saved(path: Path, change: Change | None = None) -> Path:
    model = good()
    if change is not None:
        change(model)
    onnx.save(model, path)
    return path


def test_a_good_graph_breaks_nothing(tmp_path: Path) -> None:
    onnx.checker.check_model(good(), full_check=True)
    assert check_file(saved(tmp_path / "good.onnx")) == []
    require_conformance(tmp_path / "good.onnx")


@pytest.mark.parametrize("change", BREAKS, ids=lambda change: change.__name__)
def test_every_rule_finds_what_breaks_it(tmp_path: Path, change: Change) -> None:
    rule, count, text = BREAKS[change]
    found = [violation for violation in check_file(saved(tmp_path / "bad.onnx", change)) if violation.rule == rule]
    assert len(found) == count
    assert f"{rule}: {text}" in map(str, found)
    with pytest.raises(IncompatibleError, match="breaks rules of Vitis AI"):
        require_conformance(tmp_path / "bad.onnx")


def test_there_is_a_graph_for_every_rule() -> None:
    assert len({rule for rule, _, _ in BREAKS.values()}) == len(RULES)


def test_everything_is_reported_at_once(tmp_path: Path) -> None:
    def all_at_once(model: onnx.ModelProto) -> None:
        for change in (newer, unknown, asymmetric, crooked, float_result):
            change(model)

    rules = {violation.rule for violation in check_file(saved(tmp_path / "bad.onnx", all_at_once))}
    assert rules == {"opset", "operator", "symmetric int8", "int8 product"}, "the crooked scale went with its node"


def test_what_is_no_graph_is_said(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="no such file"):
        check_file(tmp_path / "nix.onnx")
    (tmp_path / "text.onnx").write_text("hello")
    with pytest.raises(VerificationError, match="not an ONNX model"):
        check_file(tmp_path / "text.onnx")


def test_the_command_lists_them_and_ends_with_4(tmp_path: Path) -> None:
    result = CliRunner().invoke(main, ["conformance", str(saved(tmp_path / "bad.onnx", crooked))])
    assert result.exit_code == 4
    assert result.stdout.splitlines()[-1].endswith("bad.onnx: 2 violations (2 of scale)")
    result = CliRunner().invoke(main, ["conformance", str(tmp_path / "bad.onnx"), "--json"])
    violations = json.loads(result.stdout)["violations"]
    assert [violation["where"] for violation in violations] == ["quantise_y", "dequantise_y"]
    result = CliRunner().invoke(main, ["conformance", str(saved(tmp_path / "good.onnx"))])
    assert (result.exit_code, result.stdout.splitlines()[-1][-27:]) == (0, "keeps the rules of Vitis AI")
