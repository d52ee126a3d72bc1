"""GenAI's model builder without the model in memory: weights come from mapped files and leave one at a time.

As it is, the builder loads the whole model in fp32, casts it into tensors that it keeps, and for int4 serialises all of
it once more before the quantiser starts: about nine bytes a parameter. Three of its methods are exchanged, as Olive
exchanges others; every node and every number is still made by the builder and its quantiser.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edgetune.config import Base
from edgetune.formats.genai import HALF
from edgetune.model.blocks import BITS

if TYPE_CHECKING:
    import onnx_ir as ir


@contextmanager
def lean_builder(base: Base) -> Iterator[None]:
    """Within, the builder maps, casts and quantises weight by weight. Every tensor is the same to the byte.

    Args:
        base: What becomes of linear layers where the builder would make them int4: that, int8, or fp16.
    """
    model = import_module("onnxruntime_genai.models.builder").Model
    lean = {
        "load_weights": _map_weights,
        "make_initializer": _cast_once(model.make_initializer),
        "to_int4": _halve if base == "fp16" else _quantise_one_by_one(model.to_int4, BITS.get(base)),
    }
    original = {name: getattr(model, name) for name in lean}
    for name, method in lean.items():
        setattr(model, name, method)
    try:
        yield
    finally:
        for name, method in original.items():
            setattr(model, name, method)


def _map_weights(builder: Any, folder: str) -> Any:
    """transformers' model over the checkpoint's own tensors: read where they lie in the files, when they are used."""
    import torch
    from safetensors import safe_open
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.from_pretrained(folder, trust_remote_code=builder.hf_remote)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, trust_remote_code=builder.hf_remote)
    tensors = {}
    for path in sorted(Path(folder).glob("*.safetensors")):
        with safe_open(path, "pt") as listed:
            names = list(listed.keys())
        for name in names:
            with safe_open(path, "pt") as mapped:  # a mapping of its own, which goes when this tensor goes
                tensors[name] = mapped.get_tensor(name)
    model.load_state_dict(tensors, assign=True, strict=False)  # a tied head has no tensor of its own
    model.tie_weights()
    return model


def _cast_once(make_initializer: Callable[..., None]) -> Callable[..., None]:
    """Give up a weight when it is cast; the builder's own closure keeps the result for good."""

    def make(builder: Any, tensor: Any, /, name: str, to: ir.DataType | None = None) -> None:
        import onnx_ir as ir
        from onnx_ir.tensor_adapters import TorchTensor, to_torch_dtype

        make_initializer(builder, tensor, name, to)
        if to is None:
            return
        held = [tensor]

        def cast() -> TorchTensor:
            return TorchTensor(held.pop().to(to_torch_dtype(to)), name=name)

        builder.model.graph.initializers[name].const_value = ir.LazyTensor(
            cast, dtype=to, shape=ir.Shape(tensor.shape), name=name
        )

    return make


def _quantise_one_by_one(to_int4: Callable[[Any], ir.Model], bits: int | None) -> Callable[[Any], ir.Model]:
    """Let the builder quantise one `MatMul` after the other, each as a model of its own."""

    def quantise(builder: Any) -> ir.Model:
        from onnxruntime.quantization.matmul_nbits_quantizer import DefaultWeightOnlyQuantConfig

        whole: ir.Model = builder.model
        options = builder.quant_attrs["int4"]
        options["algo_config"] = DefaultWeightOnlyQuantConfig(
            block_size=options["qdq_block_size"],
            is_symmetric=options["is_symmetric"],
            accuracy_level=options["accuracy_level"],
            bits=bits,
        )
        for node, activation, weight in _products(whole.graph):
            builder.model = _model_of(node, activation, weight, whole)
            (quantised,) = to_int4(builder).graph
            _become(node, quantised, whole.graph)
            del whole.graph.initializers[str(weight.name)]
        builder.model = whole
        return whole

    return quantise


def _halve(builder: Any) -> ir.Model:
    """Store the weight of every `MatMul` in fp16, and cast it where it is used."""
    import onnx_ir as ir

    whole: ir.Model = builder.model
    for node, _, weight in list(_products(whole.graph)):
        name = str(weight.name)
        del whole.graph.initializers[name]
        half = ir.Value(name=name + HALF, type=ir.TensorType(ir.DataType.FLOAT16), shape=weight.shape)
        half.const_value = _as_half(weight, str(half.name))
        whole.graph.register_initializer(half)
        cast = ir.node("Cast", [half], attributes={"to": ir.DataType.FLOAT}, name=f"{name}.Cast")
        cast.outputs[0].name = name
        whole.graph.insert_before(node, cast)
        node.replace_input_with(1, cast.outputs[0])
    return whole


def _as_half(weight: ir.Value, name: str) -> ir.LazyTensor:
    """The weight in fp16, made when it is written."""
    import numpy as np
    import onnx_ir as ir

    def half() -> ir.Tensor[Any]:
        tensor = weight.const_value
        assert tensor is not None  # for mypy: it is an initializer
        values = tensor.numpy().astype(np.float16)
        if not np.isfinite(values).all():
            raise ValueError(f"{weight.name} has numbers that fp16 cannot hold; use --base fp32 or int8")
        return ir.Tensor(values, name=name)

    shape = ir.Shape([] if weight.shape is None else weight.shape)
    return ir.LazyTensor(half, dtype=ir.DataType.FLOAT16, shape=shape, name=name)


def _products(graph: ir.Graph) -> Iterator[tuple[ir.Node, ir.Value, ir.Value]]:
    """Every `MatMul` with a weight: node, activation, weight."""
    for node in graph:
        activation, weight = node.inputs[:2] if node.op_type == "MatMul" else (None, None)
        if activation is not None and weight is not None and weight.is_initializer():
            yield node, activation, weight


def _model_of(node: ir.Node, activation: ir.Value, weight: ir.Value, whole: ir.Model) -> ir.Model:
    """The product alone."""
    import onnx_ir as ir

    source, output = ir.Value(name=activation.name), ir.Value(name=node.outputs[0].name)
    copy = ir.Value(name=weight.name, type=weight.type, shape=weight.shape, const_value=weight.const_value)
    alone = ir.Node("", "MatMul", [source, copy], outputs=[output], name=node.name)
    opsets = dict(whole.graph.opset_imports)
    graph = ir.Graph([source], [output], nodes=[alone], initializers=[copy], opset_imports=opsets)
    return ir.Model(graph, ir_version=whole.ir_version)


def _become(node: ir.Node, quantised: ir.Node, graph: ir.Graph) -> None:
    """Turn the product into what the quantiser made of it."""
    import onnx_ir as ir

    node.op_type, node.domain, node.name = quantised.op_type, quantised.domain, quantised.name
    node.attributes.update(quantised.attributes)
    node.resize_inputs(len(quantised.inputs))
    for index, value in enumerate(quantised.inputs):
        if value is None or value.const_value is None:
            continue
        # A copy, and let go: the quantiser's own tensor keeps its whole model alive, the weight in fp32 included.
        tensor = ir.Tensor(value.const_value.numpy().copy(), name=value.name)
        value.const_value = None
        stored = ir.Value(name=value.name, type=value.type, shape=value.shape, const_value=tensor)
        graph.register_initializer(stored)
        node.replace_input_with(index, stored)
