"""The end of the layered form: final norm, logits and the loss of trained rows, a piece of the vocabulary at a time.

With z = norm(hidden)·Wᵀ the loss of a row is logsumexp(z) − z[label], and its gradient (softmax(z) − onehot(label))·W =
softmax(z)·W − W[label]. Pieces of the vocabulary need two graphs: `head` gives every piece's logsumexp, which add up;
`head_grad` takes the sum. `head_step` does all at once where the piece is the whole vocabulary.
"""

from __future__ import annotations

import onnx_ir as ir

from edgetune.preparation.rewrites.operators import IR_VERSION, OPSET, Operators
from edgetune.runtimes.layered.head import NORM, WEIGHT


def build_head(hidden_size: int, epsilon: float) -> dict[str, ir.Model]:
    """The three graphs by their names.

    Inputs: `hidden` and `label_weights` (rows, hidden_size), `model.norm.weight` (hidden_size), `lm_head.weight`
    (tokens, hidden_size): the piece. `label_weights` is W[label] for one of the pieces and zero for all others.

    - `head`: outputs `logsumexp` (rows, 1) over the piece, `target` (rows, 1): the label's logit, or 0.
    - `head_grad`: also takes `logsumexp` (rows, 1) over the vocabulary and `scale` (1); output `hidden.grad`.
    - `head_step`: also takes `scale`; outputs `losses` (rows, 1) and `hidden.grad`. The piece is the vocabulary.

    `hidden.grad` (rows, hidden_size) is the gradient of scale · Σ losses; the gradients of the pieces add up to it.

    Args:
        hidden_size: Channels of a hidden state.
        epsilon: The epsilon of the final norm.
    """
    return {
        "head": _Head(hidden_size, epsilon).forward(),
        "head_grad": _Head(hidden_size, epsilon).gradient(),
        "head_step": _Head(hidden_size, epsilon).step(),
    }


class _Head:
    """The operators of one graph."""

    def __init__(self, hidden_size: int, epsilon: float) -> None:
        self._op = op = Operators()
        self._size = hidden_size
        self._inputs: dict[str, ir.Value] = {}
        self._hidden = self._input("hidden", ["rows", hidden_size])
        self._label_weights = self._input("label_weights", ["rows", hidden_size])
        self._norm = self._input(NORM, [hidden_size])
        self._weight = self._input(WEIGHT, ["tokens", hidden_size])
        mean = self._mean(op.op("Mul", [self._hidden, self._hidden]))
        root = op.op("Sqrt", [op.op("Add", [mean, op.floats(epsilon)])])
        self._inverse = op.op("Reciprocal", [root])
        self._normal = op.op("Mul", [self._hidden, self._inverse])
        self._scaled = op.op("Mul", [self._normal, self._norm])
        self._logits = op.op("Gemm", [self._scaled, self._weight], attributes={"transB": 1})

    def forward(self) -> ir.Model:
        """See `build_head`."""
        return self._model("head", {"logsumexp": self._exponentials()[1], "target": self._target()})

    def gradient(self) -> ir.Model:
        """See `build_head`."""
        logsumexp = self._input("logsumexp", ["rows", 1])
        probabilities = self._op.op("Exp", [self._op.op("Sub", [self._logits, logsumexp])])
        product = self._op.op("MatMul", [probabilities, self._weight])
        return self._model("head_grad", {"hidden.grad": self._hidden_gradient(product)})

    def step(self) -> ir.Model:
        """See `build_head`."""
        op = self._op
        exponentials, logsumexp, total = self._exponentials()
        losses = op.op("Sub", [logsumexp, self._target()])
        product = op.op("Div", [op.op("MatMul", [exponentials, self._weight]), total])
        return self._model("head_step", {"losses": losses, "hidden.grad": self._hidden_gradient(product)})

    def _model(self, name: str, outputs: dict[str, ir.Value]) -> ir.Model:
        for output, value in outputs.items():
            value.name, value.dtype = output, ir.DataType.FLOAT
            value.shape = ir.Shape(["rows", self._size if output == "hidden.grad" else 1])
        for number, node in enumerate(self._op.nodes):
            node.name = f"{number}_{node.op_type}"
        graph = ir.Graph(
            list(self._inputs.values()), list(outputs.values()), nodes=self._op.nodes,
            opset_imports={"": OPSET}, name=name,
        )  # fmt: skip
        return ir.Model(graph, ir_version=IR_VERSION)

    def _exponentials(self) -> tuple[ir.Value, ir.Value, ir.Value]:
        """exp(z − max z), the logsumexp of z, and the exponentials' sum; a Softmax would be taken for attention."""
        op = self._op
        largest = op.op("ReduceMax", [self._logits, op.integers(-1)], attributes={"keepdims": 1})
        exponentials = op.op("Exp", [op.op("Sub", [self._logits, largest])])
        total = op.op("ReduceSum", [exponentials, op.integers(-1)], attributes={"keepdims": 1})
        return exponentials, op.op("Add", [largest, op.op("Log", [total])]), total

    def _target(self) -> ir.Value:
        products = self._op.op("Mul", [self._scaled, self._label_weights])
        return self._op.op("ReduceSum", [products, self._op.integers(-1)], attributes={"keepdims": 1})

    def _hidden_gradient(self, expected: ir.Value) -> ir.Value:
        """The gradient of `hidden`, from softmax(z)·W."""
        op = self._op
        d_scaled = op.op("Sub", [expected, self._label_weights])
        d_normal = op.op("Mul", [op.op("Mul", [d_scaled, self._norm]), self._input("scale", [1])])
        mean = self._mean(op.op("Mul", [d_normal, self._normal]))
        return op.op("Mul", [self._inverse, op.op("Sub", [d_normal, op.op("Mul", [self._normal, mean])])])

    def _mean(self, value: ir.Value) -> ir.Value:
        return self._op.op("ReduceMean", [value, self._op.integers(-1)], attributes={"keepdims": 1})

    def _input(self, name: str, shape: list[int | str]) -> ir.Value:
        value = ir.Value(name=name, type=ir.TensorType(ir.DataType.FLOAT), shape=ir.Shape(shape))
        return self._inputs.setdefault(name, value)
