"""Folders of a few bytes that `edgetune inspect` knows: a bundle, an adapter and a model."""

from __future__ import annotations

import json
from pathlib import Path

import onnx
from onnx import TensorProto, helper

from edgetune.formats.adapter import write_adapter
from edgetune.formats.bundle import list_files, seal_bundle
from edgetune.formats.manifest import BaseModel, BundleManifest, Graph, TensorSpec, Tokenizer
from edgetune.model.architecture import Architecture
from edgetune.model.lora import Lora, Slot, initial_parameters
from edgetune.model.rope import Rope

BASE = BaseModel("tiny-phi3", "ab" * 32, "int4")
TOKENIZER = Tokenizer("cd" * 32, "ef" * 32, "<s>", "<|end|>", 0)
SLOTS = [Slot("model.layers.0.self_attn.qkv_proj", 16, 48), Slot("model.layers.0.self_attn.o_proj", 16, 16)]
LORA = Lora(4, 8.0, ["o_proj", "qkv_proj"], SLOTS)
PARAMETERS = 4 * 16 + 48 * 4 + 4 * 16 + 16 * 4
ARCHITECTURE = Architecture(
    hidden_size=16,
    intermediate_size=32,
    num_hidden_layers=1,
    num_attention_heads=2,
    num_key_value_heads=1,
    head_dim=8,
    vocab_size=512,
    max_position_embeddings=128,
    sliding_window=None,
    tie_word_embeddings=False,
    rope=Rope(8, 10000.0, 1.0, None, None, 128),
)


def make_bundle(folder: Path) -> Path:
    """A sealed folder that says it is a bundle; its graphs are a few bytes."""
    folder.mkdir()
    files = {"step.onnx": b"step", "genai_config.json": b"{}", "config.json": b"{}", "model.onnx.data": bytes(5000)}
    for name, data in files.items():
        (folder / name).write_bytes(data)
    step = Graph("step", "step.onnx", [TensorSpec("input_ids", "int64", ["b", "s"])], [TensorSpec("loss", "f32", [1])])
    manifest = BundleManifest(
        format="edgetune-bundle",
        format_version=1,
        base=BASE,
        architecture=ARCHITECTURE,
        tokenizer=TOKENIZER,
        lora=LORA,
        max_length=64,
        graphs=[step],
        gradient_coverage={"MatMul": 3},
        provenance={"edgetune": "0.1.0"},
        files=list_files(folder, without="manifest.json"),
    )
    seal_bundle(folder, manifest)
    return folder


def make_adapter(folder: Path) -> Path:
    folder.mkdir()
    parameters = initial_parameters(LORA, seed=0)
    write_adapter(
        folder, base=BASE, tokenizer=TOKENIZER, lora=LORA, parameters=parameters, provenance={"edgetune": "0.1.0"}
    )
    return folder


def make_model(folder: Path) -> Path:
    folder.mkdir()
    logits = helper.make_tensor_value_info("logits", TensorProto.FLOAT, ["batch", "sequence", 512])
    ids = helper.make_tensor_value_info("input_ids", TensorProto.INT64, ["batch", "sequence"])
    graph = helper.make_graph([helper.make_node("Cast", ["input_ids"], ["logits"], to=1)], "g", [ids], [logits])
    onnx.save(helper.make_model(graph), folder / "model.onnx")
    config = {
        "model": {"context_length": 128, "eos_token_id": 2, "decoder": {"filename": "model.onnx"}, "type": "phi3"}
    }
    (folder / "genai_config.json").write_text(json.dumps(config))
    (folder / "adapters").mkdir()
    (folder / "adapters" / "mine.onnx_adapter").write_bytes(b"adapter")
    return folder
