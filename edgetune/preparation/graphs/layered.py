"""The layered form of the training step: a few small graphs that every decoder layer shares, weights as inputs.

A loop runs them layer by layer, so that no more than one sublayer's weights and activations have to be in memory. The
backward graph of a sublayer is its vector-Jacobian product: ONNX Runtime Training differentiates Σ output, then the
gradient of `output` becomes an input and that of `hidden` an output.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from pathlib import Path

import numpy as np
import onnx_ir as ir

from edgetune.config import PrepareConfig
from edgetune.formats.roles import LAYERS, WIDE
from edgetune.host.checkpoint import Checkpoint
from edgetune.model.architecture import Architecture
from edgetune.model.blocks import BITS
from edgetune.model.lora import GAIN
from edgetune.model.pieces import Pieces, cut, cut_wide
from edgetune.preparation.gradient import ARTIFACTS, differentiate
from edgetune.preparation.graphs.adamw import build_flat_adamw
from edgetune.preparation.graphs.dequantise import build_dequantise
from edgetune.preparation.graphs.head import build_head
from edgetune.preparation.graphs.skeleton import skeleton
from edgetune.preparation.graphs.sublayers import ANCHOR, export_sublayer, sublayers_of
from edgetune.preparation.rewrites.frozen_weights import cancel_transposes
from edgetune.preparation.rewrites.int8_products import build_int8
from edgetune.preparation.rewrites.lowering import lower
from edgetune.preparation.rewrites.operators import IR_VERSION, OPSET, Operators, remove_unused
from edgetune.preparation.rewrites.shapes import dimensions, resolve_shapes


def build_layers(
    checkpoint: Path,
    scratch: Path,
    folder: Path,
    source: Checkpoint,
    config: PrepareConfig,
    say: Callable[[str], None],
) -> list[str]:
    """Write the layered form into a bundle folder that holds the GenAI model already.

    Args:
        checkpoint: Folder with a Phi-3 `config.json`; no weight is read.
        scratch: A folder for intermediate files.
        folder: The folder of the bundle that is being built.
        source: The same checkpoint, as `open_checkpoint` returned it.
        config: Rank, alpha and targets of the slots, and how the weights are stored.
        say: Called with a line of text if the side environment has to be made first.

    Returns:
        The roles of the graphs, which are their files in the bundle without `.onnx`.

    Raises:
        IncompatibleError: An operator has no gradient.
    """
    sublayers = _in_all_widths(checkpoint, scratch, source.architecture, config, say)
    bits = BITS.get(config.base, min(BITS.values()))
    graphs = {
        **sublayers,
        **build_int8(sublayers, bits),
        **build_head(source.architecture.hidden_size, skeleton(checkpoint, config, layers=1).config.rms_norm_eps),
        "adamw_flat": build_flat_adamw(),
        "dequantise": build_dequantise(bits),
    }
    for name, graph in graphs.items():
        file = folder / LAYERS / f"{name}.onnx"
        file.parent.mkdir(parents=True, exist_ok=True)
        ir.save(graph, file)
    return [f"{LAYERS}/{name}" for name in graphs]


def _in_all_widths(
    checkpoint: Path, scratch: Path, architecture: Architecture, config: PrepareConfig, say: Callable[[str], None]
) -> dict[str, ir.Model]:
    """The graphs of both sublayers, and of their wide pieces where those are others."""
    pieces, wide = cut(architecture), cut_wide(architecture)
    graphs = build_sublayers(checkpoint, scratch, architecture, config, pieces, say)
    if wide != pieces:
        for name, graph in build_sublayers(checkpoint, scratch / WIDE, architecture, config, wide, say).items():
            graphs[f"{WIDE}/{name}"] = graph
    return graphs


def build_sublayers(
    checkpoint: Path,
    scratch: Path,
    architecture: Architecture,
    config: PrepareConfig,
    pieces: Pieces,
    say: Callable[[str], None],
) -> dict[str, ir.Model]:
    """The graphs of both sublayers by their names: `attention`, `attention_grad`, `attention_grad_kept`, `mlp`, ….

    - `NAME`: what `export_sublayer` describes, without the anchor and the objective.
    - `NAME_grad`: takes `output.grad` and `carry`, shaped as `hidden`, instead of `residual`. Outputs `hidden.grad` =
      carry + the gradient through this piece, and `<parameter>.grad` of every LoRA parameter. The first piece's carry
      is `output.grad`, the gradient of the residual; that of the others the `hidden.grad` of the piece before.
    - `NAME_grad_kept`: also takes the kept activations, and recomputes less.
    - `NAME_projected`, with DoRA: takes the frozen weights and A of the slots, and gives `X.projected`, A·Wᵀ (rank,
      rows), of every weight `X.weight`.

    Args:
        checkpoint: Folder with a Phi-3 `config.json`; no weight is read.
        scratch: A folder for intermediate files.
        architecture: Sizes of the model.
        config: Rank, alpha and targets of the slots.
        pieces: How the sublayers are cut.
        say: Called with a line of text if the side environment has to be made first.

    Raises:
        IncompatibleError: An operator has no gradient.
    """
    graphs: dict[str, ir.Model] = {}
    for sublayer in sublayers_of(config):
        folder = scratch / sublayer.name
        folder.mkdir(parents=True)
        trainable = export_sublayer(checkpoint, folder / "forward.onnx", architecture, config, sublayer, pieces)
        forward = resolve_shapes(ir.load(folder / "forward.onnx"))
        (anchored,) = _value(forward, ANCHOR).consumers()
        hidden = str(anchored.outputs[0].name)
        parameters = {
            name: np.zeros([int(size) for size in dimensions(_value(forward, name))], np.float32)
            for name in [*trainable, ANCHOR]
        }
        undifferentiated = _copy(forward)
        differentiate(forward, parameters, folder, say)
        gradient = _vector_jacobian_product(ir.load(folder / ARTIFACTS["training_model"]), hidden, trainable)
        # What only the gradient of a projection without a slot would take is not kept.
        taken = ir.convenience.create_value_mapping(gradient.graph)
        kept = [name for name in sublayer.kept if name in taken]
        graphs[sublayer.name] = _forward_graph(undifferentiated, hidden, trainable, kept)
        graphs[f"{sublayer.name}_grad"] = gradient
        graphs[f"{sublayer.name}_grad_kept"] = _with_inputs(_copy(gradient), kept)
        if config.dora and (projections := _projections(graphs[sublayer.name])):
            graphs[f"{sublayer.name}_projected"] = _projected(graphs[sublayer.name], projections)
    return graphs


def _forward_graph(forward: ir.Model, hidden: str, trainable: list[str], kept: list[str]) -> ir.Model:
    forward.graph.opset_imports[""] = OPSET
    forward.ir_version = IR_VERSION
    _value(forward, hidden).replace_all_uses_with(_value(forward, "hidden"))
    return _finished(lower(forward, trainable, ["output", *kept]))


def _vector_jacobian_product(training: ir.Model, hidden: str, trainable: list[str]) -> ir.Model:
    graph = training.graph
    source = _value(training, "hidden")
    given, carry = (ir.Value(name=name, shape=source.shape, type=source.type) for name in ("output.grad", "carry"))
    _value(training, "output_grad").replace_all_uses_with(given)
    total = ir.node("Add", [carry, _value(training, f"{hidden}_grad")], name="carried")
    (result,) = total.outputs
    result.name, result.shape, result.type = "hidden.grad", source.shape, source.type
    graph.append(total)
    graph.inputs.extend([given, carry])
    graph.outputs.append(result)
    _value(training, hidden).replace_all_uses_with(source)
    return _finished(lower(training, trainable, ["hidden.grad"]))


def _projections(forward: ir.Model) -> dict[str, str]:
    """The A that belongs to each frozen weight of a sublayer, by the weight's name without `.weight`."""
    names = [str(value.name) for value in forward.graph.inputs]
    parts = {"q_proj": "qkv_proj", "k_proj": "qkv_proj", "v_proj": "qkv_proj", "gate_proj": "gate_up_proj"}
    parts["up_proj"] = "gate_up_proj"
    found = [name.removesuffix(GAIN) for name in names if name.endswith(GAIN)]
    return {name: f"{parts.get(name, name)}.lora_A.weight" for name in found}


def _projected(forward: ir.Model, projections: Mapping[str, str]) -> ir.Model:
    op = Operators()
    taken: dict[str, ir.Value] = {}
    outputs = []
    for name, a in projections.items():
        for given in (f"{name}.weight", a):
            shape = [int(size) for size in dimensions(_value(forward, given))]
            taken.setdefault(given, ir.val(given, dtype=ir.DataType.FLOAT, shape=shape))
        weight = taken[f"{name}.weight"]
        product = op.op("MatMul", [taken[a], op.swap_last(weight, 2)])
        product.name, product.dtype = f"{name}.projected", ir.DataType.FLOAT
        product.shape = ir.Shape([dimensions(taken[a])[0], dimensions(weight)[0]])
        outputs.append(product)
    for number, node in enumerate(op.nodes):
        node.name = f"{number}_{node.op_type}"
    graph = ir.Graph(list(taken.values()), outputs, nodes=op.nodes, name="projected", opset_imports={"": OPSET})
    return ir.Model(graph, ir_version=IR_VERSION, producer_name="edgetune")


def _with_inputs(model: ir.Model, names: Iterable[str]) -> ir.Model:
    """Cut the graph: the values of these names become inputs instead of being computed."""
    for name in names:
        computed = _value(model, name)
        given = ir.Value(shape=computed.shape, type=computed.type)
        computed.replace_all_uses_with(given)
        computed.name, given.name = f"{name}.recomputed", name
        model.graph.inputs.append(given)
    return _finished(model)


def _finished(model: ir.Model) -> ir.Model:
    cancel_transposes(model.graph)
    _transpose_the_narrow_side(model.graph)
    remove_unused(model)
    return model


def _transpose_the_narrow_side(graph: ir.Graph) -> None:
    """Transpose(Xᵀ·D) is Dᵀ·X: D, the gradient of rank columns, is transposed instead of the wide X."""
    for node in graph:
        product = node.inputs[0].producer() if node.op_type == "Transpose" and node.inputs[0] is not None else None
        if product is None or product.op_type != "Gemm" or "transA" not in product.attributes:
            continue
        wide, narrow = product.inputs[:2]
        if dimensions(wide)[1] > dimensions(narrow)[1]:  # type: ignore[operator]
            product.replace_input_with(0, narrow)
            product.replace_input_with(1, wide)
            result, name = product.outputs[0], node.outputs[0].name
            result.shape = node.outputs[0].shape
            ir.convenience.replace_all_uses_with(node.outputs[0], result, replace_graph_outputs=True)
            node.outputs[0].name, result.name = f"{name}.before", name


def _copy(model: ir.Model) -> ir.Model:
    return ir.from_proto(ir.to_proto(model))


def _value(model: ir.Model, name: str) -> ir.Value:
    return ir.convenience.create_value_mapping(model.graph)[name]
