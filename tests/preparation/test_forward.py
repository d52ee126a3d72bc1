"""The forward graph: its contract, what it computes against PyTorch + PEFT, and its cost at full size."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import onnx
import onnxruntime as ort
import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import Phi3ForCausalLM

from edgetune.config import PrepareConfig
from edgetune.data.batches import make_batch
from edgetune.data.encode import Example
from edgetune.host.rope_config import rope_from_config
from edgetune.model.lora import Lora, Slot
from edgetune.preparation.graphs.forward import export_forward
from support import oracle
from support.tiny_phi3 import VARIANTS, checkpoint

CONFIG = PrepareConfig(rank=3, alpha=5.0, targets="attention")
ATTENTION = ("self_attn.o_proj", "self_attn.qkv_proj")
LINEAR = (*ATTENTION, "mlp.gate_up_proj", "mlp.down_proj")
PHI3_MINI = {
    "model_type": "phi3",
    "architectures": ["Phi3ForCausalLM"],
    "vocab_size": 32064,
    "hidden_size": 3072,
    "intermediate_size": 8192,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 32,
    "max_position_embeddings": 4096,
    "original_max_position_embeddings": 4096,
    "pad_token_id": 32000,
}
PHI3_MINI_PARAMETERS = 3_821_079_552
"""As its model card counts them: embedding, layers, norms and head."""
# Prints what the export added to this process's peak memory, in bytes.
EXPORT = """
import resource, sys, time
from pathlib import Path
import torch, peft, transformers, onnxscript
from optimum.exporters.onnx import export
from edgetune.config import PrepareConfig
from edgetune.preparation.graphs.forward import export_forward
peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
before = peak()
export_forward(Path(sys.argv[1]), Path(sys.argv[2]), PrepareConfig())
print(peak() - before)
"""


def config_only(folder: Path, config: dict[str, object]) -> Path:
    """A checkpoint folder that holds no weight."""
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def exported(variant: str, folder: Path, config: PrepareConfig) -> tuple[Lora, Path]:
    source = config_only(folder / "source", json.loads((checkpoint(variant) / "config.json").read_text()))
    return export_forward(source, folder / "forward.onnx", config), folder / "forward.onnx"


def dims_of(value: onnx.ValueInfoProto) -> list[int | str]:
    return [dim.dim_param or dim.dim_value for dim in value.type.tensor_type.shape.dim]


@pytest.mark.parametrize("variant", VARIANTS)
def test_loss_and_logits_are_pytorchs(variant: str, tmp_path: Path) -> None:
    lora, graph = exported(variant, tmp_path, CONFIG)
    torch.manual_seed(1)
    base = Phi3ForCausalLM.from_pretrained(checkpoint(variant), dtype=torch.float32, attn_implementation="eager")
    adapter = LoraConfig(r=3, lora_alpha=5, target_modules=["qkv_proj", "o_proj"], init_lora_weights=False)
    model = get_peft_model(base, adapter).eval()
    weights = {
        name.removeprefix("base_model.model.").replace(".base_layer.", ".").replace(".default.", "."): value.numpy()
        for name, value in model.state_dict().items()
    }
    assert {name for name in weights if ".lora_" in name} == set(lora.shapes())
    rows = [Example(0, list(range(5, 35)), [-100] * 3 + list(range(8, 35))), Example(1, [9, 8, 7], [9, -100, 7])]
    rope = rope_from_config(json.loads((checkpoint(variant) / "config.json").read_text()))
    batch = make_batch(rows, rope, 2)
    session = ort.InferenceSession(graph, providers=["CPUExecutionProvider"])
    feed = batch.tensors() | weights | {"loss_scale": np.array([0.25], np.float32)}
    objective, loss, logits = session.run(["objective", "loss", "logits"], feed)
    with torch.no_grad():
        expected_loss = oracle.loss(model, rows).item()
        expected_logits = model(torch.tensor([rows[0].input_ids])).logits[0].numpy()
    assert loss.shape == objective.shape == (1,)
    np.testing.assert_allclose(loss, expected_loss, rtol=1e-5)
    np.testing.assert_allclose(objective, 0.25 * expected_loss, rtol=1e-5)
    np.testing.assert_allclose(logits[0, :30], expected_logits, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(("targets", "modules"), [("attention", ATTENTION), ("all-linear", LINEAR)])
def test_contract(targets: str, modules: tuple[str, ...], tmp_path: Path) -> None:
    lora, path = exported("grouped-query", tmp_path, PrepareConfig(rank=5, alpha=7.5, targets=targets))  # type: ignore[arg-type]
    packed = 4 * 32 + 2 * 2 * 32
    sizes = {
        "self_attn.o_proj": (128, 128),
        "self_attn.qkv_proj": (128, packed),
        "mlp.gate_up_proj": (128, 384),
        "mlp.down_proj": (192, 128),
    }
    assert (lora.rank, lora.alpha, lora.scaling_of("qkv_proj")) == (5, 7.5, 1.5)
    assert sorted(lora.target_modules) == sorted(name.partition(".")[2] for name in modules)
    assert lora.slots == [Slot(f"model.layers.{i}.{name}", *sizes[name]) for i in (0, 1) for name in modules]
    graph = onnx.load(path).graph
    inputs = {value.name: dims_of(value) for value in graph.input}
    assert dict(list(inputs.items())[:6]) == {
        "input_ids": ["batch", "sequence"],
        "labels": ["batch", "sequence"],
        "attn_bias": ["batch", 1, "sequence", "sequence"],
        "rope_cos": ["batch", "sequence", 32],
        "rope_sin": ["batch", "sequence", 32],
        "loss_scale": [1],
    }
    frozen = {
        name: dims for name, dims in list(inputs.items())[6:] if ".lora_" not in name
    }  # as the checkpoint names them
    assert frozen["model.layers.1.mlp.gate_up_proj.weight"] == [384, 128]
    assert frozen["lm_head.weight"] == [448, 128]
    assert len(frozen) == 2 * 6 + 3
    slots = {name: tuple(dims) for name, dims in inputs.items() if ".lora_" in name}
    assert slots == lora.shapes()
    assert [value.name for value in graph.output] == ["objective", "loss", "logits"]
    assert not any(tensor.dims and np.prod(tensor.dims) > 64 for tensor in graph.initializer), "no weight inside"


def test_head_of_tied_embeddings_has_its_own_weight(tmp_path: Path) -> None:
    _, path = exported("partial", tmp_path, CONFIG)
    inputs = {value.name: dims_of(value) for value in onnx.load(path).graph.input}
    assert inputs["lm_head.weight"] == inputs["model.embed_tokens.weight"] == [448, 128]
    assert inputs["rope_cos"] == ["batch", "sequence", 16], "half of a head of 32 is rotated"


def test_full_size_exports_as_a_skeleton(tmp_path: Path) -> None:
    source = config_only(tmp_path / "source", dict(PHI3_MINI))
    command = [sys.executable, "-c", EXPORT, str(source), str(tmp_path / "forward.onnx")]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
    assert int(done.stdout.split()[-1]) < 2e9
    assert sum(file.stat().st_size for file in tmp_path.iterdir() if file.is_file()) < 4e6
    graph = onnx.load(tmp_path / "forward.onnx").graph
    frozen = [dims_of(v) for v in graph.input if re.search(r"\.weight$", v.name) and ".lora_" not in v.name]
    assert sum(int(np.prod(dims)) for dims in frozen) == PHI3_MINI_PARAMETERS
