"""The frozen weights of the training graphs: the GenAI model's bytes, nothing else, and the values they stand for."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime as ort
import pytest
from numpy.typing import NDArray
from onnx import numpy_helper
from safetensors.numpy import load_file

from edgetune.config import Base
from edgetune.errors import VerificationError
from edgetune.formats.bundle import Bundle
from edgetune.preparation.graphs.forward import export_forward
from edgetune.preparation.rewrites.frozen_weights import attach_weights
from edgetune.preparation.rewrites.shapes import resolve_shapes
from support.prepared_bundles import CONFIG, Prepared
from support.tiny_phi3 import VARIANTS, checkpoint

Array = NDArray[np.float32]
ROLES = ["step", "loss", "training_model", "eval_model"]
BASES: list[Base] = ["int4", "fp32"]
SMALL = 4096
"""Bytes; zero points, shapes and scalars lie in the graph itself."""
LAYERS = 2


def load(bundle: Bundle, role: str) -> onnx.ModelProto:
    return onnx.load(bundle.file(role), load_external_data=False)


def checkpoint_tensors(variant: str) -> dict[str, Array]:
    """The frozen tensors under the checkpoint's names; a tied head is the embedding."""
    tensors = load_file(checkpoint(variant) / "model.safetensors")
    tensors.setdefault("lm_head.weight", tensors["model.embed_tokens.weight"])
    return tensors


def stored_names(name: str) -> set[str]:
    """The GenAI model's names of the tensors that make up the checkpoint's tensor `name`, without their suffixes."""
    module = name.removesuffix(".weight")
    if module == "model.norm":
        return {f"model.layers.{LAYERS}.final_norm_layernorm"}
    if module.endswith("gate_up_proj"):
        return {module.replace("gate_up", half) for half in ("gate", "up")}
    return {module.replace(".self_attn.", ".attn.")}


def frozen_values(model: onnx.ModelProto, folder: Path) -> Iterator[tuple[set[str], Array]]:
    """Every value that depends on weights alone and meets the data: which tensors it is made of, and what it is."""
    origins: dict[str, set[str]] = {
        tensor.name: {tensor.name.split(".MatMul.")[0].removesuffix(".weight")}
        if tensor.data_location == onnx.TensorProto.EXTERNAL
        else set()
        for tensor in model.graph.initializer
    }
    boundary = set()
    for node in model.graph.node:
        if all(name in origins for name in node.input if name):
            made_of = set().union(*(origins[name] for name in node.input if name))
            origins.update(dict.fromkeys(node.output, made_of))
        else:
            boundary.update(name for name in node.input if origins.get(name))
    names = sorted(boundary)
    nodes = [node for node in model.graph.node if all(name in origins for name in (*node.input, *node.output) if name)]
    identities = [onnx.helper.make_node("Identity", [name], [f"{name}/value"]) for name in names]
    outputs = [onnx.helper.make_tensor_value_info(f"{name}/value", onnx.TensorProto.FLOAT, None) for name in names]
    graph = onnx.helper.make_graph([*nodes, *identities], "frozen", [], outputs, model.graph.initializer)
    frozen = onnx.helper.make_model(graph, opset_imports=model.opset_import, ir_version=model.ir_version)
    onnx.load_external_data_for_model(frozen, str(folder))
    options = ort.SessionOptions()
    options.log_severity_level = 3  # it warns of every constant that the rest of the graph takes
    session = ort.InferenceSession(frozen.SerializeToString(), options, providers=["CPUExecutionProvider"])
    for name, value in zip(names, session.run(None, {}), strict=True):
        yield origins[name], value


def dequantised(folder: Path, name: str) -> Array:
    """(q − 8) · scale of every block of 32, low nibble first."""
    stored = {tensor.name: tensor for tensor in onnx.load(folder / "model.onnx").graph.initializer}
    packed = numpy_helper.to_array(stored[f"{name}.MatMul.weight_Q4"])
    scales = numpy_helper.to_array(stored[f"{name}.MatMul.weight_scales"])
    values = np.stack([packed & 15, packed >> 4], axis=-1).reshape(*packed.shape[:2], 32).astype(np.float32) - 8
    result: Array = (values * scales.reshape(*packed.shape[:2], 1)).reshape(packed.shape[0], -1)
    return result


@pytest.mark.parametrize("role", ROLES)
@pytest.mark.parametrize("base", BASES)
def test_weights_lie_in_the_genai_models_data_alone(prepared: Prepared, base: Base, role: str) -> None:
    bundle = prepared("partial", base)
    model = load(bundle, role)
    used = []
    for tensor in model.graph.initializer:
        if tensor.data_location != onnx.TensorProto.EXTERNAL:
            assert tensor.ByteSize() < SMALL, tensor.name
            continue
        entries = {entry.key: entry.value for entry in tensor.external_data}
        assert entries["location"] == "model.onnx.data"
        used.append((int(entries["offset"]), int(entries["length"])))
    size = (bundle.path / "model.onnx.data").stat().st_size
    assert all(offset >= 0 and offset + length <= size for offset, length in used)
    # Whatever large tensor the GenAI model has, the graph reads too; only its rotary caches are its own.
    genai = onnx.load(bundle.path / "model.onnx", load_external_data=False).graph.initializer
    large = {
        tensor.name: int(entry.value)
        for tensor in genai
        for entry in tensor.external_data
        if entry.key == "offset" and "_cache" not in tensor.name
    }
    assert set(large.values()) == {offset for offset, _ in used}
    assert len(used) == len(large), "each once"
    # No weight in another place either: constants within nodes are small.
    assert sum(node.ByteSize() for node in model.graph.node) < 400 * len(model.graph.node)
    frozen = [value.name for value in model.graph.input if ".lora_" not in value.name and "weight" in value.name]
    assert frozen == []


@pytest.mark.parametrize("role", ROLES)
@pytest.mark.parametrize("base", BASES)
@pytest.mark.parametrize("variant", VARIANTS)
def test_values_are_the_checkpoints(prepared: Prepared, variant: str, base: Base, role: str) -> None:
    bundle = prepared(variant, base)
    expected = checkpoint_tensors(variant)
    by_origin = {frozenset(stored_names(name)): name for name in expected}
    seen = set()
    for made_of, found in frozen_values(load(bundle, role), bundle.path):
        name = by_origin[frozenset(made_of)]
        seen.add(name)
        original = expected[name]
        linear = name.endswith("_proj.weight") or name == "lm_head.weight"
        if base == "int4" and linear:
            parts = sorted(made_of)  # gate before up
            blocks = np.concatenate([dequantised(bundle.path, part) for part in parts])
            # A step of a block is at least an eighth of its largest value.
            assert np.abs(blocks - original).max() <= np.abs(original).max() / 7
            assert np.corrcoef(blocks.ravel(), original.ravel())[0, 1] > 0.98
            original = blocks
        # Forward products read the transposed matrix, backward ones the matrix.
        assert any(np.array_equal(turned, original) for turned in (found, found.T)), f"{name} of {role}"
    assert seen == set(expected)


def test_square_weights_are_not_taken_for_their_transposes(prepared: Prepared) -> None:
    """The test above accepts either orientation; o_proj is square, so the product itself has to show it."""
    bundle = prepared("multi-head", "fp32")
    original = checkpoint_tensors("multi-head")["model.layers.0.self_attn.o_proj.weight"]
    assert original.shape[0] == original.shape[1]
    model = load(bundle, "loss")
    product = next(node for node in model.graph.node if node.input[1:2] == ["model.layers.0.attn.o_proj.MatMul.weight"])
    assert product.op_type == "MatMul"
    stored = next(t for t in onnx.load(bundle.file("model")).graph.initializer if t.name == product.input[1])
    np.testing.assert_array_equal(numpy_helper.to_array(stored), original.T)


def test_unknown_naming_is_refused(prepared: Prepared, tmp_path: Path) -> None:
    import onnx_ir as ir

    bundle = prepared("multi-head", "int4")
    (tmp_path / "model.onnx.data").write_bytes((bundle.path / "model.onnx.data").read_bytes())
    genai = onnx.load(bundle.path / "model.onnx", load_external_data=False)
    next(t for t in genai.graph.initializer if t.name == "lm_head.MatMul.weight_Q4").name = "head"
    (tmp_path / "model.onnx").write_bytes(genai.SerializeToString())
    x, weight = (ir.val(name, dtype=ir.DataType.FLOAT, shape=[448, 128]) for name in ("x", "lm_head.weight"))
    node = ir.node("Add", [x, weight])
    graph = ir.Graph([x, weight], node.outputs, nodes=[node], opset_imports={"": 21}, name="head")
    with pytest.raises(VerificationError, match=r"no tensor 'lm_head\.MatMul\.weight_Q4'"):
        attach_weights(ir.Model(graph, ir_version=10), tmp_path, bundle.manifest.architecture, "int4")


def test_attaching_reads_no_weight(prepared: Prepared, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Four graphs refer to the weights; had each of them read them, prepare would need their size four times over."""
    bundle = prepared("grouped-query", "int4")
    export_forward(checkpoint("grouped-query"), tmp_path / "forward.onnx", CONFIG)
    graph = resolve_shapes(ir.load(tmp_path / "forward.onnx"))
    read = []
    original = ir.ExternalTensor.numpy

    def recorded(tensor: ir.ExternalTensor) -> np.ndarray:
        read.append(tensor.size)
        return original(tensor)

    monkeypatch.setattr(ir.ExternalTensor, "numpy", recorded)
    attach_weights(graph, bundle.path, bundle.manifest.architecture, "int4")
    assert max(read, default=0) <= 4096
