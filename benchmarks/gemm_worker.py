"""What the machine can do at most: the speed of one matrix product, by library and type."""

from __future__ import annotations

from collections.abc import Callable
from statistics import median
from time import perf_counter

import numpy as np
from numpy.typing import NDArray

from benchmarks.experiments import GemmLimit

SECONDS = 2.0
"""How long a product is repeated."""


def measure_gemm(experiment: GemmLimit) -> dict[str, float]:
    """Repeat a product whose right side is constant, as frozen weights are; the median counts."""
    run = {
        ("torch", "fp32"): _torch,
        ("torch", "bf16"): _torch,
        ("onnxruntime", "fp32"): _onnxruntime,
        ("onnxruntime", "int8"): _onnxruntime,
        ("openvino", "bf16"): _openvino,
    }[experiment.library, experiment.dtype](experiment)
    run()
    times: list[float] = []
    while len(times) < 3 or sum(times) < SECONDS:
        begin = perf_counter()
        run()
        times.append(perf_counter() - begin)
    return {"flops_per_second": 2 * experiment.m * experiment.k * experiment.n / median(times)}


def _torch(experiment: GemmLimit) -> Callable[[], object]:
    import torch

    dtype = {"fp32": torch.float32, "bf16": torch.bfloat16}[experiment.dtype]
    left = torch.randn(experiment.m, experiment.k).to(dtype)
    weight = torch.randn(experiment.n, experiment.k).to(dtype)
    out = torch.empty(experiment.m, experiment.n, dtype=dtype)
    return lambda: torch.mm(left, weight.T, out=out)


def _onnxruntime(experiment: GemmLimit) -> Callable[[], object]:
    """fp32, or unsigned activations times signed weights, which is what int8 units multiply."""
    import onnx
    import onnxruntime
    from onnx import TensorProto, helper, numpy_helper

    generator = np.random.default_rng(0)
    m, k, n = experiment.m, experiment.k, experiment.n
    left: NDArray[np.generic]
    weight: NDArray[np.generic]
    if experiment.dtype == "int8":
        left = generator.integers(0, 255, (m, k)).astype(np.uint8)
        weight = generator.integers(-127, 127, (k, n)).astype(np.int8)
        node = helper.make_node("MatMulInteger", ["left", "weight", "zero"], ["out"])
        zero = [numpy_helper.from_array(np.array(128, np.uint8), "zero")]
        types = TensorProto.UINT8, TensorProto.INT32
    else:
        left = generator.standard_normal((m, k), np.float32)
        weight = generator.standard_normal((k, n), np.float32)
        node, zero = helper.make_node("MatMul", ["left", "weight"], ["out"]), []
        types = TensorProto.FLOAT, TensorProto.FLOAT
    graph = helper.make_graph(
        [node],
        "gemm",
        [helper.make_tensor_value_info("left", types[0], [m, k])],
        [helper.make_tensor_value_info("out", types[1], [m, n])],
        [numpy_helper.from_array(weight, "weight"), *zero],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)
    onnx.checker.check_model(model)
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    binding = session.io_binding()
    binding.bind_cpu_input("left", left)
    out = np.empty((m, n), helper.tensor_dtype_to_np_dtype(types[1]))
    binding.bind_ortvalue_output("out", onnxruntime.OrtValue.ortvalue_from_numpy(out))
    return lambda: session.run_with_iobinding(binding)


def _openvino(experiment: GemmLimit) -> Callable[[], object]:
    import openvino
    from openvino import opset13 as ops

    generator = np.random.default_rng(0)
    left = ops.parameter([experiment.m, experiment.k], np.float32)
    weight = ops.constant(generator.standard_normal((experiment.n, experiment.k), np.float32))
    product = ops.matmul(left, weight, transpose_a=False, transpose_b=True)
    compiled = openvino.Core().compile_model(
        openvino.Model([product], [left], "gemm"), "CPU", {"INFERENCE_PRECISION_HINT": "bf16"}
    )
    request = compiled.create_infer_request()
    request.set_input_tensor(openvino.Tensor(generator.standard_normal((experiment.m, experiment.k), np.float32)))

    def run() -> None:
        request.start_async()
        request.wait()

    return run
