"""A merged fp32 model is quantised to int4 again, by Olive's blockwise round-to-nearest pass."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from edgetune.frozen import BLOCK_SIZE
from edgetune.genai import ACCURACY_LEVEL, MODEL, WEIGHTS, weight_name
from edgetune.olive_pass import run_olive_pass

if TYPE_CHECKING:
    import onnx


def quantise_layers(source: Path, output: Path) -> None:
    """Round all linear layers and the head to int4; embedding and norms stay fp32.

    Args:
        source: Folder with the fp32 `model.onnx` and `model.onnx.data`.
        output: Folder for the int4 ones.

    Raises:
        EdgetuneError: Olive failed.
    """
    import onnx

    graph = onnx.load(str(source / MODEL), load_external_data=False).graph
    weights = {tensor.name for tensor in graph.initializer}
    layers = [node.name for node in graph.node if node.op_type == "MatMul" and node.input[1] in weights]
    config: dict[str, object] = {
        "bits": 4,
        "block_size": BLOCK_SIZE,
        "is_symmetric": True,
        "accuracy_level": ACCURACY_LEVEL,
        "nodes_to_include": layers,
        "save_as_external_data": True,
        "all_tensors_to_one_file": True,
        "external_data_name": WEIGHTS,
        "size_threshold": 0,
    }
    built = source / "int4"
    run_olive_pass("OnnxBlockWiseRtnQuantization", config, source / MODEL, built)
    model = onnx.load(str(built / MODEL), load_external_data=False)
    _restore_outputs(model)
    onnx.save(model, str(output / MODEL))
    (built / WEIGHTS).replace(output / WEIGHTS)


def _restore_outputs(model: onnx.ModelProto) -> None:
    """Undo the pass's renaming of graph outputs: GenAI asks for `logits` by name."""
    for output in model.graph.output:
        if output.name != weight_name(output.name):
            node = next(node for node in model.graph.node if output.name in node.output)
            output.name = node.output[0] = weight_name(output.name)
