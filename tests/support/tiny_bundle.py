"""A bundle around a bigram model: a real loss graph with one LoRA slot, small enough to check by hand."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np

from edgetune.formats.bundle import Bundle, list_files, load_bundle, seal_bundle
from edgetune.formats.manifest import BUNDLE_FORMAT, BUNDLE_VERSION, BaseModel, BundleManifest, Graph, Tokenizer
from edgetune.formats.storage import sha256_of
from edgetune.model.architecture import Architecture
from edgetune.model.lora import Lora, Slot
from edgetune.model.rope import Rope

WORDS = ["<pad>", "<unk>", "<eos>", *"abcdefghijklm"]
VOCABULARY = len(WORDS)
SLOT = Slot("model.layers.0.self_attn.qkv_proj", VOCABULARY, VOCABULARY)
LORA = Lora(rank=4, alpha=8.0, target_modules=["qkv_proj"], slots=[SLOT])
BASE = BaseModel("bigram", "b" * 64, "fp32")
BASE_LOGITS = np.random.default_rng(7).normal(size=(VOCABULARY, VOCABULARY)).astype(np.float32)
"""Logits of the next token, a row a token."""
MAX_LENGTH = 12


def make_bundle(folder: Path) -> Bundle:
    """Write the bundle and open it."""
    from tokenizers import Tokenizer as HfTokenizer
    from tokenizers.models import WordLevel
    from tokenizers.pre_tokenizers import WhitespaceSplit

    folder.mkdir()
    tokenizer = HfTokenizer(WordLevel({word: index for index, word in enumerate(WORDS)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = WhitespaceSplit()
    tokenizer.add_special_tokens(["<pad>", "<eos>"])
    tokenizer.save(str(folder / "tokenizer.json"))
    write_loss_graph(folder / "loss.onnx")
    seal_bundle(
        folder,
        BundleManifest(
            format=BUNDLE_FORMAT,
            format_version=BUNDLE_VERSION,
            base=BASE,
            architecture=Architecture(8, 8, 1, 1, 1, 8, VOCABULARY, 64, None, False, Rope(8, 1e4, 1.0, None, None, 64)),
            tokenizer=Tokenizer(sha256_of(folder / "tokenizer.json"), None, None, "<eos>", 0),
            lora=LORA,
            max_length=MAX_LENGTH,
            graphs=[Graph("loss", "loss.onnx", [], [])],
            gradient_coverage={},
            provenance={},
            files=list_files(folder, without="manifest.json"),
        ),
    )
    return load_bundle(folder)


def write_loss_graph(path: Path) -> None:
    """loss and predictions of logits[x] = BASE_LOGITS[x] + scaling · B · A[:, x]."""
    import onnx
    from onnx import TensorProto, helper, numpy_helper

    rows: list[int | str] = ["batch", "sequence"]
    inputs = [
        helper.make_tensor_value_info("input_ids", TensorProto.INT64, rows),
        helper.make_tensor_value_info("labels", TensorProto.INT64, rows),
        helper.make_tensor_value_info("attn_bias", TensorProto.FLOAT, ["batch", 1, "sequence", "sequence"]),
        helper.make_tensor_value_info("rope_cos", TensorProto.FLOAT, [*rows, 8]),
        helper.make_tensor_value_info("rope_sin", TensorProto.FLOAT, [*rows, 8]),
        *(helper.make_tensor_value_info(name, TensorProto.FLOAT, shape) for name, shape in LORA.shapes().items()),
    ]
    nodes = [
        helper.make_node("Gather", ["table", "input_ids"], ["frozen"]),
        helper.make_node("Transpose", [SLOT.a], ["a"]),
        helper.make_node("Transpose", [SLOT.b], ["b"]),
        helper.make_node("Gather", ["a", "input_ids"], ["low"]),
        helper.make_node("MatMul", ["low", "b"], ["update"]),
        helper.make_node("Mul", ["update", "scaling"], ["scaled"]),
        helper.make_node("Add", ["frozen", "scaled"], ["logits"]),
        helper.make_node("Transpose", ["logits"], ["scores"], perm=[0, 2, 1]),
        helper.make_node("SoftmaxCrossEntropyLoss", ["scores", "labels"], ["mean"], ignore_index=-100),
        helper.make_node("Reshape", ["mean", "one"], ["loss"]),
        helper.make_node("ArgMax", ["logits"], ["predictions"], axis=-1, keepdims=0),
    ]
    constants = [
        numpy_helper.from_array(BASE_LOGITS, "table"),
        numpy_helper.from_array(np.array(LORA.scaling_of(SLOT.module), np.float32), "scaling"),
        numpy_helper.from_array(np.array([1], np.int64), "one"),
    ]
    outputs = [
        helper.make_tensor_value_info("loss", TensorProto.FLOAT, [1]),
        helper.make_tensor_value_info("predictions", TensorProto.INT64, rows),
    ]
    graph = helper.make_graph(nodes, "loss", inputs, outputs, constants)
    model = helper.make_model(graph, ir_version=10, opset_imports=[helper.make_opsetid("", 18)])
    onnx.save(model, path)


def write_rows(path: Path, rows: list[dict[str, str]]) -> Path:
    """Write JSONL."""
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def some_rows(count: int, seed: int = 0) -> list[dict[str, str]]:
    """Rows of 3 to 6 words that follow each other in the alphabet, so that there is something to learn."""
    generator = np.random.default_rng(seed)
    letters = WORDS[3:]
    rows = []
    for _ in range(count):
        first, length = generator.integers(len(letters)), generator.integers(2, 6)
        words = [letters[(first + step) % len(letters)] for step in range(length + 1)]
        rows.append({"prompt": words[0], "completion": " " + " ".join(words[1:])})
    return rows
