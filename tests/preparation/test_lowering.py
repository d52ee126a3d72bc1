"""Every lowering against ONNX Runtime Training's own kernel, which the side environment runs."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import product

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime as ort
import pytest
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

from edgetune.errors import IncompatibleError
from edgetune.preparation.rewrites.lowering import LOWERINGS, lower
from edgetune.side_environment import ensure_side_environment, run_worker
from support.repository import ROOT
from support.tiny_phi3 import silent

WORKER = ROOT / "tests" / "support" / "kernel_worker.py"
TRAINING = "com.microsoft"
RMS_NORM = "SimplifiedLayerNormalization"
Arrays = dict[str, NDArray[np.generic]]
_random = np.random.default_rng(7)


@dataclass(frozen=True)
class Case:
    """A graph around one operator that the gradient builder emits. `lower` keeps outputs called loss and predictions,
    so these are the names of the operator's results here."""

    nodes: Sequence[onnx.NodeProto]
    inputs: Arrays
    outputs: Sequence[str] = ("loss",)
    constants: Arrays = field(default_factory=dict)

    def model(self) -> onnx.ModelProto:
        graph = helper.make_graph(
            self.nodes,
            "case",
            [
                helper.make_tensor_value_info(name, helper.np_dtype_to_tensor_dtype(array.dtype), array.shape)
                for name, array in self.inputs.items()
            ],
            [helper.make_tensor_value_info(name, TensorProto.FLOAT, None) for name in self.outputs],
            [numpy_helper.from_array(array, name) for name, array in self.constants.items()],
        )
        opsets = [helper.make_opsetid("", 21), helper.make_opsetid(TRAINING, 1)]
        return helper.make_model(graph, opset_imports=opsets, ir_version=10)

    def operators(self) -> set[str]:
        return {node.op_type for node in self.nodes}


def floats(*shape: int) -> NDArray[np.float32]:
    return _random.standard_normal(shape, dtype=np.float32)


def node(
    op_type: str, inputs: Sequence[str], outputs: Sequence[str] = ("loss",), **attributes: float | str
) -> onnx.NodeProto:
    # The only one of them that ONNX Runtime registers beside the standard operators.
    standard = op_type == RMS_NORM or onnx.defs.has(op_type)
    return helper.make_node(
        op_type, inputs, outputs, f"{op_type}_of_{outputs[0]}", domain="" if standard else TRAINING, **attributes
    )


def labels_of(*shape: int, classes: int, trained: int) -> NDArray[np.int64]:
    """Labels of which `trained` count, at random places; 0 and the last class are among them where there is room."""
    labels = np.full(math.prod(shape), -100, np.int64)
    values = np.resize([classes - 1, 0, *_random.integers(0, classes, 8)], trained)
    labels[_random.permutation(labels.size)[:trained]] = values
    return labels.reshape(shape)


def cross_entropy_cases() -> dict[str, Case]:
    """As the exporter writes it: logits and labels are flattened before the loss, and the gradient is folded back."""
    loss_of = {"reduction": "mean", "ignore_index": -100}
    flatten = [node("Reshape", ["logits", "rows"], ["flat"]), node("Reshape", ["labels", "row"], ["flat_labels"])]
    forward = [*flatten, node("SoftmaxCrossEntropyLoss", ["flat", "flat_labels"], ["loss", "log_p"], **loss_of)]
    gradient = [
        *flatten,
        node("SoftmaxCrossEntropyLoss", ["flat", "flat_labels"], ["mean", "log_p"], **loss_of),
        node("Reshape", ["d_loss", "scalar"], ["d_mean"]),
        node("SoftmaxCrossEntropyLossGrad", ["d_mean", "log_p", "flat_labels"], ["d_flat"], **loss_of),
        node("Reshape", ["d_flat", "shape"]),
    ]
    cases = {}
    for batch, sequence, classes, trained, size in [(2, 5, 7, 10, 1), (3, 4, 9, 6, 30), (1, 6, 5, 1, 1)]:
        arrays: Arrays = {
            "logits": size * floats(batch, sequence, classes),
            "labels": labels_of(batch, sequence, classes=classes, trained=trained),
        }
        constants: Arrays = {"rows": np.array([-1, classes]), "row": np.array([-1])}
        shape = {"scalar": np.array([], np.int64), "shape": np.array([batch, sequence, classes])}
        name = f"{batch}x{sequence}x{classes}-{trained}-trained"
        cases[f"loss-{name}"] = Case(forward, arrays, ("loss",), constants)
        cases[f"loss-grad-{name}"] = Case(
            gradient, arrays | {"d_loss": np.array([-0.7], np.float32)}, ("loss",), constants | shape
        )
    flat = {"logits": floats(6, 5), "labels": labels_of(6, classes=5, trained=4)}
    flat_loss = node("SoftmaxCrossEntropyLoss", ["logits", "labels"], ["loss", "predictions"], **loss_of)
    cases["loss-of-rows"] = Case([flat_loss], flat, ("loss", "predictions"))
    log_p = flat["logits"] - np.log(np.exp(flat["logits"]).sum(-1, keepdims=True))
    cases["loss-grad-of-rows"] = Case(
        [node("SoftmaxCrossEntropyLossGrad", ["d_loss", "log_p", "labels"], **loss_of)],
        {"d_loss": np.array(1.3, np.float32), "log_p": log_p, "labels": flat["labels"]},
    )
    return cases


def elementwise_cases() -> dict[str, Case]:
    cases = {}
    for shape, axis in [((2, 3, 4), -1), ((2, 3, 5, 5), -1), ((2, 3, 4), 1), ((6, 4), 0)]:
        y = np.exp(floats(*shape))
        inputs = {"d_y": floats(*shape), "y": y / y.sum(axis, keepdims=True)}
        cases[f"softmax-grad-{shape}-{axis}"] = Case([node("SoftmaxGrad_13", ["d_y", "y"], axis=axis)], inputs)
    for alpha in (1.0, 1.702, 0.3):
        x = 3 * floats(2, 3, 4)
        cases[f"quick-gelu-{alpha}"] = Case([node("QuickGelu", ["x"], alpha=alpha)], {"x": x})
        cases[f"quick-gelu-grad-{alpha}"] = Case(
            [node("QuickGeluGrad", ["d_y", "x"], alpha=alpha)], {"d_y": floats(2, 3, 4), "x": x}
        )
    return cases


def norm_cases() -> dict[str, Case]:
    cases = {}
    for shape, epsilon in [((2, 3, 8), 1e-5), ((5, 16), 0.5), ((1, 1, 4), 1e-5)]:
        x, weight = floats(*shape), 1 + floats(shape[-1])
        inverse = 1 / np.sqrt((x * x).mean(-1, keepdims=True) + np.float32(epsilon))
        name = f"{shape}-{epsilon}"
        cases[f"rms-norm-{name}"] = Case(
            [
                node(
                    RMS_NORM, ["x", "weight"], ["loss", "predictions"],
                    axis=-1, epsilon=epsilon, stash_type=1,
                )
            ],
            {"x": x, "weight": weight},
            ("loss", "predictions"),
        )  # fmt: skip
        cases[f"rms-norm-grad-{name}"] = Case(
            [
                node(f"{RMS_NORM}Grad", ["d_y", "x", "weight", "inverse"], ["loss", "d_weight"], axis=-1)
            ],
            {"d_y": floats(*shape), "x": x, "weight": weight, "inverse": inverse},
        )
    return cases


def joining_cases() -> dict[str, Case]:
    cases = {}
    for axis, sizes in [(-1, (4, 2)), (1, (1, 3, 2)), (2, (3, 3))]:
        parts = []
        for size in sizes:
            shape = [2, 3, 4]
            shape[axis] = size
            parts.append(floats(*shape))
        names = [f"part{index}" for index in range(len(parts))]
        cases[f"concat-{axis}-{sizes}"] = Case(
            [
                node("ConcatTraining", names, ["loss", "sizes"], axis=axis),
                node("Cast", ["sizes"], ["floats"], to=TensorProto.FLOAT),
                node("Mul", ["floats", "factor"], ["predictions"]),
            ],
            {**dict(zip(names, parts, strict=True)), "factor": floats(1)},
            ("loss", "predictions"),
        )
        # In another order, so that every part has its own place in the result.
        cases[f"split-{axis}-{sizes}"] = Case(
            [node("SplitTraining", ["x", "sizes"], names, axis=axis), node("Concat", names[::-1], axis=axis)],
            {"x": np.concatenate(parts, axis)},
            constants={"sizes": np.array(sizes)},
        )
    return cases


def product_cases() -> dict[str, Case]:
    cases = {}
    for flip_left, flip_right, alpha in product((0, 1), (0, 1), (1.0, -0.25)):
        for batch in ((), (2,), (2, 3)):
            left = floats(*batch, *((5, 4) if flip_left else (4, 5)))
            right = floats(*batch, *((6, 5) if flip_right else (5, 6)))
            cases[f"matmul-{flip_left}{flip_right}-{alpha}-{len(batch) + 2}d"] = Case(
                [node("FusedMatMul", ["left", "right"], transA=flip_left, transB=flip_right, alpha=alpha)],
                {"left": left, "right": right},
            )
    weight = {"x": floats(2, 3, 4), "weight": floats(6, 4)}
    cases["matmul-of-a-weight"] = Case([node("FusedMatMul", ["x", "weight"], transB=1)], weight)
    return cases


CASES = {
    **cross_entropy_cases(), **elementwise_cases(), **norm_cases(), **joining_cases(), **product_cases()
}  # fmt: skip


@pytest.fixture(scope="module")
def kernels(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Arrays]:
    """What ONNX Runtime Training computes, all cases in one process."""
    folder = tmp_path_factory.mktemp("kernels")
    for number, case in enumerate(CASES.values()):
        onnx.save(case.model(), folder / f"{number}.onnx")
        np.savez(folder / f"{number}.npz", **case.inputs)
    ensure_side_environment(silent)
    run_worker(WORKER, [str(folder)])
    return {name: dict(np.load(folder / f"{number}.out.npz")) for number, name in enumerate(CASES)}


def lowered(case: Case, *, half: bool = False) -> ir.Model:
    return lower(ir.from_proto(case.model()), [], half=half)


def run(model: ir.Model, inputs: Arrays) -> Arrays:
    proto = ir.to_proto(model)
    onnx.checker.check_model(proto)
    session = ort.InferenceSession(proto.SerializeToString(), providers=["CPUExecutionProvider"])
    names = [output.name for output in session.get_outputs()]
    return dict(zip(names, session.run(None, inputs), strict=True))


@pytest.mark.parametrize("name", CASES)
def test_standard_form_computes_what_the_kernel_does(name: str, kernels: dict[str, Arrays]) -> None:
    case = CASES[name]
    model = lowered(case)
    assert not {node.op_type for node in model.graph} & {*LOWERINGS, "SplitTraining"}
    assert list(model.opset_imports) == [""]
    found = run(model, case.inputs)
    assert list(found) == list(case.outputs)
    for output, expected in kernels[name].items():
        assert np.abs(expected).max() > 1e-3, "zeros would show nothing"
        # The lowered loss is of shape (1) where the kernel's is a scalar.
        actual = found[output] if expected.ndim else found[output].reshape(())
        np.testing.assert_allclose(actual, expected, rtol=2e-5, atol=2e-6)


@pytest.mark.parametrize("largest", [1e-30, 1e-3, 1.0, 1e25, 3e38])
def test_norms_square_nothing_large(largest: float) -> None:
    """Half the range of exponents is enough for a square: what float16 makes of 24,890, float32 makes of 1e25."""
    epsilon = 1e-5
    x, d_y, weight = floats(2, 3, 8), floats(2, 3, 8), 1 + floats(8)
    x *= np.float32(largest / np.abs(x).max())
    names = ["x", "weight"]
    norm = node(RMS_NORM, names, ["loss", "inverse"], axis=-1, epsilon=epsilon, stash_type=1)
    gradient = node(f"{RMS_NORM}Grad", ["d_y", *names, "inverse"], ["predictions", "d_weight"], axis=-1)
    found = run(
        lowered(Case([norm, gradient], {"d_y": d_y, "x": x, "weight": weight}, ("loss", "predictions")), half=True),
        {"d_y": d_y, "x": x, "weight": weight},
    )
    inverse = 1 / np.sqrt((x.astype(np.float64) ** 2).mean(-1, keepdims=True) + epsilon)
    d_normal, normal = d_y * weight.astype(np.float64), x * inverse
    expected = inverse * (d_normal - normal * (d_normal * normal).mean(-1, keepdims=True))
    np.testing.assert_allclose(found["loss"], normal * weight, rtol=2e-5, atol=2e-6 * min(1, largest))
    # Up to the gradient's own size: where rows cancel, little is left.
    np.testing.assert_allclose(found["predictions"], expected, rtol=2e-5, atol=5e-6 * np.abs(expected).max())


def test_a_norm_that_is_written_out_has_the_same_form() -> None:
    """As the exporter writes it in the forward graphs, which are not differentiated."""
    constants: Arrays = {"two": np.array(2, np.float32), "axis": np.array([-1]), "one": np.array(1, np.float32)}
    constants |= {"epsilon": np.array(1e-5, np.float32)}
    inputs: Arrays = {"x": 1e25 * floats(2, 3, 8), "weight": 1 + floats(8)}
    nodes = [
        node("Pow", ["x", "two"], ["square"]),
        node("ReduceMean", ["square", "axis"], ["mean"], keepdims=1),
        node("Add", ["mean", "epsilon"], ["sum"]),
        node("Sqrt", ["sum"], ["root"]),
        node("Div", ["one", "root"], ["inverse"]),
        node("Mul", ["x", "inverse"], ["normal"]),
        node("Mul", ["weight", "normal"]),
    ]
    model = lowered(Case(nodes, inputs, constants=constants), half=True)
    assert "Pow" not in {each.op_type for each in model.graph}
    x = inputs["x"].astype(np.float64)
    expected = x / np.sqrt((x * x).mean(-1, keepdims=True)) * inputs["weight"]
    np.testing.assert_allclose(run(model, inputs)["loss"], expected, rtol=2e-5, atol=2e-6)


def test_every_lowering_has_a_case() -> None:
    covered = set().union(*(case.operators() for case in CASES.values()))
    assert not {*LOWERINGS, "SplitTraining"} - covered


@pytest.mark.parametrize("name", [name for name in CASES if name.startswith("loss")])
def test_loss_needs_neither_scalars_nor_empty_tensors(name: str) -> None:
    case = CASES[name]
    proto = onnx.shape_inference.infer_shapes(ir.to_proto(lowered(case)), strict_mode=True, data_prop=True)
    values = [*proto.graph.value_info, *proto.graph.output]
    assert values
    given = {0} if name == "loss-grad-of-rows" else set()  # its own input is a scalar
    ranks = {len(value.type.tensor_type.shape.dim) for value in values}
    assert 0 not in ranks - given
    assert all(math.prod(tensor.dims) > 0 for tensor in proto.graph.initializer)


def test_nothing_to_train_gives_zero_loss_and_zero_gradient() -> None:
    case = CASES["loss-grad-2x5x7-10-trained"]
    inputs = case.inputs | {"labels": np.full((2, 5), -100)}
    assert not run(lowered(case), inputs)["loss"].any()
    loss = CASES["loss-2x5x7-10-trained"]
    assert run(lowered(loss), loss.inputs | {"labels": np.full((2, 5), -100)})["loss"] == [0.0]


def test_unknown_operators_are_all_named() -> None:
    nodes = [
        node("BiasGelu", ["x", "b"], ["y"]),
        node("QuickGelu", ["y"], ["z"], alpha=1.0),
        node("FastGelu", ["z"]),
    ]
    with pytest.raises(IncompatibleError) as caught:
        lowered(Case(nodes, {"x": floats(2, 3), "b": floats(3)}))
    message = str(caught.value)
    assert "BiasGelu (BiasGelu_of_y)" in message
    assert "FastGelu (FastGelu_of_loss)" in message
    assert "QuickGelu" not in message


@pytest.mark.parametrize("flag", ["transBatchA", "transBatchB"])
def test_transposed_batches_are_refused(flag: str) -> None:
    matmul = node("FusedMatMul", ["a", "b"], **{flag: 1})
    with pytest.raises(IncompatibleError, match="FusedMatMul"):
        lowered(Case([matmul], {"a": floats(2, 2, 2), "b": floats(2, 2, 2)}))


@pytest.mark.parametrize("op_type", ["SoftmaxCrossEntropyLoss", "SoftmaxCrossEntropyLossGrad"])
@pytest.mark.parametrize("changes", [{"reduction": "sum"}, {"reduction": "none"}, {"ignore_index": 3}, {"weighted": 1}])
def test_other_losses_are_refused(op_type: str, changes: dict[str, int | str]) -> None:
    forward = op_type == "SoftmaxCrossEntropyLoss"
    inputs: Arrays = {} if forward else {"d_loss": np.array(1, np.float32)}
    inputs |= {"scores": floats(6, 5), "labels": labels_of(6, classes=5, trained=4)}
    if "weighted" in changes:
        inputs |= {"weights": floats(5)}
    attributes = {"reduction": "mean", "ignore_index": -100, **{k: v for k, v in changes.items() if k != "weighted"}}
    with pytest.raises(IncompatibleError, match=op_type):
        lowered(Case([node(op_type, list(inputs), ["loss"], **attributes)], inputs))


def test_concatenation_along_the_sequence_is_refused() -> None:
    case = CASES["concat-1-(1, 3, 2)"]
    model = case.model()
    model.graph.input[0].type.tensor_type.shape.dim[1].dim_param = "sequence"
    with pytest.raises(IncompatibleError, match="part0: dimension 1 is sequence"):
        lower(ir.from_proto(model), [])
