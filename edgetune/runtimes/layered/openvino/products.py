"""How OpenVINO multiplies with frozen weights: what is put in the place of a graph's products with them.

All rows of a batch are multiplied at once, because OpenVINO packs a matrix again for every batch entry. Products can be
int8: a row of x becomes round(127 · x / max|x|), which the processor multiplies with an int8 weight. The weight's
scales, one for each of its rows, are multiplied with what comes out in the forward pass, and with what goes in in the
backward pass, whose sum runs over these rows. One int8 matrix serves both.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import openvino as ov
from numpy.typing import NDArray
from openvino import opset13 as op

from edgetune.formats.roles import INT8, SCALES
from edgetune.model.rotation import signs_of
from edgetune.runtimes.layered.head import SPLIT, WEIGHT

_LARGEST = 127.0
_SMALLEST_ROW = 1e-30
"""Instead of the largest magnitude of a row of zeros."""
_SUBLAYER_WEIGHT = "_proj.weight"
_UNIT = np.float32(1)
"""OpenVINO takes a product for an int8 one when a scale stands on either side; the true ones are applied outside."""


@dataclass(frozen=True)
class Products:
    """What graphs expect of frozen weights, and how they multiply with them."""

    int8: bool
    """A weight `W` of a sublayer is a rotated int8 matrix `W.int8` with scales `W.int8.scales` (out)."""
    short: bool = False
    """Exact products round what they multiply to bfloat16."""

    def inputs(self, name: str) -> tuple[str, ...]:
        """What takes the place of an input of the ONNX graph."""
        quantised = f"{name}.{INT8}"
        return (quantised, quantised + SCALES) if self.int8 and name.endswith(_SUBLAYER_WEIGHT) else (name,)

    def adapt(self, model: ov.Model) -> None:
        """Put these products in the place of a model's, whose shapes have to be known."""
        quantised: dict[tuple[str, int], _Quantised] = {}
        for parameter in model.get_parameters():
            name = parameter.output(0).any_name
            if not is_linear(name):
                continue
            matrix, scales = parameter.output(0), None
            if self.inputs(name) != (name,):
                out, wide = parameter.shape
                added = [op.parameter([out, wide], ov.Type.i8), op.parameter([out], ov.Type.f32)]
                for node, taken in zip(added, self.inputs(name), strict=True):
                    node.output(0).set_names({taken})
                model.add_parameters(added)
                matrix, scales = (node.output(0) for node in added)
            for product, forward in list(_products(parameter)):
                if self.short and name == WEIGHT and forward:
                    _round_for_others(product.input_value(0), product)
                targets = product.output(0).get_target_inputs()
                result = self._product(product.input_value(0), matrix, scales, forward, quantised)
                for target in targets:
                    target.replace_source_output(result)
                if self.short and name == WEIGHT:
                    model.add_results(_exact_ends(result.get_node().input(0).get_source_output().get_node()))
            if scales is not None:
                model.remove_parameter(parameter)

    def _product(
        self,
        x: ov.Output,
        matrix: ov.Output,
        scales: ov.Output | None,
        forward: bool,
        quantised: dict[tuple[str, int], _Quantised],
    ) -> ov.Output:
        """x·Wᵀ in the forward pass, otherwise x·W."""
        shape = list(x.shape)
        place = (x.get_node().get_name(), x.get_index())
        rows = op.reshape(x, op.constant([-1, shape[-1]]), False).output(0)
        if scales is None:
            result = op.matmul(rows, matrix, False, forward).output(0)
        else:
            if not forward:
                left = _quantised_rows(op.multiply(rows, scales).output(0))
            else:
                if place not in quantised:
                    quantised[place] = _quantised_rows(multiplied_by(signs_of(shape[-1]), rows))
                left = quantised[place]
            right = op.multiply(op.convert(matrix, ov.Type.f32), op.constant(_UNIT))
            result = op.multiply(op.matmul(left.rows, right, False, forward), left.scales).output(0)
            signs = signs_of(result.shape[-1])
            result = op.multiply(result, scales).output(0) if forward else multiplied_by(signs, result)
        return op.reshape(result, op.constant([*shape[:-1], result.shape[-1]]), False).output(0)


def _exact_ends(product: ov.Node) -> list[ov.Node]:
    """Results that have OpenVINO compute in float32 what goes into a product, and not round what comes out.

    What leads from a product to a result is float32 there, and so is a product's output that is a result itself;
    otherwise a logit of 20 would be off by 0.06. One number is enough of what goes in.
    """
    left = product.input_value(0)
    zeros, ones = (op.constant([number] * len(left.shape)) for number in (0, 1))
    return [op.result(op.slice(left, zeros, ones, ones)), op.result(product.output(0))]


def _round_for_others(states: ov.Output, product: ov.Node) -> None:
    """Have whatever else takes these states take them as a product rounds them: the label's logit is one of its own.

    Veltkamp's splitting: of x the 8 leading bits are c − (c − x) with c = (2¹⁶ + 1) · x. OpenVINO drops a conversion to
    bfloat16 and back.
    """
    others = [target for target in states.get_target_inputs() if target.get_node() != product]
    grown = op.multiply(states, op.constant(SPLIT))
    rounded = op.subtract(grown, op.subtract(grown, states)).output(0)
    for target in others:
        target.replace_source_output(rounded)


@dataclass(frozen=True)
class _Quantised:
    rows: ov.Output
    scales: ov.Output
    """(rows, 1)"""


def is_linear(name: str) -> bool:
    """Whether an input is a frozen linear weight."""
    return name.endswith((_SUBLAYER_WEIGHT, WEIGHT))


def multiplied_by(block: NDArray[np.float32], x: ov.Output) -> ov.Output:
    """Each block of neighbours in rows (rows, channels), multiplied with a matrix of a block's size."""
    blocks = op.reshape(x, op.constant([-1, len(block)]), False)
    product = op.matmul(blocks, op.constant(block), False, False)
    return op.reshape(product, op.constant(list(x.shape)), False).output(0)


def _products(weight: ov.Node) -> Iterator[tuple[ov.Node, bool]]:
    """The products with a weight (out, in), and whether they are of the forward pass."""
    for user in weight.output(0).get_target_inputs():
        node = user.get_node()
        turned = node.get_type_name() == "Transpose"
        for use in node.output(0).get_target_inputs() if turned else [user]:
            product = use.get_node()
            if product.get_type_name() == "MatMul":
                yield product, turned or product.get_attributes()["transpose_b"]


def _quantised_rows(x: ov.Output) -> _Quantised:
    largest = op.reduce_max(op.abs(x), op.constant([-1]), True)
    bound = op.maximum(largest, op.constant(np.float32(_SMALLEST_ROW)))
    scaled = op.multiply(x, op.divide(op.constant(np.float32(_LARGEST)), bound))
    low, high = (op.constant(np.float32(limit)) for limit in (-_LARGEST - 1, _LARGEST))
    rows = op.fake_quantize(scaled, low, high, low, high, levels=256)
    return _Quantised(rows.output(0), op.multiply(bound, op.constant(np.float32(1 / _LARGEST))).output(0))
