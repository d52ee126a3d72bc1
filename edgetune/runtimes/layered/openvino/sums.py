"""How OpenVINO adds up the gradients of gains over all positions.

OpenVINO computes in bfloat16 what products come after, and in float32 what leads from the last product to a result. A
gain's gradient is a sum of elementwise products, with no product of matrices behind it: for its sake everything
elementwise in a backward graph would be float32, and converted for the matrices beside it. So the sum is a product with
a row of ones, which adds up in float32 what was rounded to bfloat16.
"""

from __future__ import annotations

import math

import numpy as np
import openvino as ov
from openvino import opset13 as op

from edgetune.model.lora import GAIN

_GRADIENT = f"{GAIN}.grad"


def sums_as_products(model: ov.Model) -> None:
    """Put products in the place of a model's sums of gains' gradients, whose shapes have to be known."""
    for node in model.get_ops():
        names = node.output(0).get_names() if node.get_type_name() == "ReduceSum" else set()
        if not any(name.endswith(_GRADIENT) for name in names):
            continue
        addends = node.input_value(0)
        *positions, channels = addends.shape
        rows = op.reshape(addends, op.constant([-1, channels]), False)
        ones = op.constant(np.ones((1, math.prod(positions)), np.float32))
        total = op.reshape(op.matmul(ones, rows, False, False), op.constant([channels]), False).output(0)
        for target in node.output(0).get_target_inputs():
            target.replace_source_output(total)
        total.set_names(names)
