"""Tiny Phi-3 models of every family variant: checkpoint, GenAI model, a bundle without training graphs, an adapter."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from edgetune.config import Base, PrepareConfig, Quantiser
from edgetune.formats.adapter import write_adapter
from edgetune.formats.bundle import Bundle, list_files, load_bundle, seal_bundle
from edgetune.formats.manifest import BUNDLE_FORMAT, BUNDLE_VERSION, BaseModel, BundleManifest, Tokenizer
from edgetune.formats.storage import sha256_of
from edgetune.model.architecture import Architecture
from edgetune.model.lora import Lora, Slot
from edgetune.model.rope import Rope

VARIANTS: dict[str, dict[str, Any]] = {
    "multi-head": {},
    "grouped-query": {"num_key_value_heads": 2},
    "longrope": {
        "max_position_embeddings": 512,
        "original_max_position_embeddings": 64,
        "rope_scaling": {
            "type": "longrope",
            "short_factor": [1.0 + 0.02 * index for index in range(16)],
            "long_factor": [1.0 + 0.3 * index for index in range(16)],
        },
    },
    "partial": {"num_key_value_heads": 2, "partial_rotary_factor": 0.5, "tie_word_embeddings": True},
}
"""What each variant changes in the configuration; `partial` also ties the embeddings, as Phi-4-mini does."""
WIDE = "wide"
"""A model with as many inputs as it takes for rounding errors to cancel."""
_MODELS = VARIANTS | {WIDE: {"hidden_size": 512, "intermediate_size": 512}}

_CONFIG: dict[str, Any] = {
    "vocab_size": 448,
    "hidden_size": 128,
    "intermediate_size": 192,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "max_position_embeddings": 256,
    "original_max_position_embeddings": 256,
    "pad_token_id": 2,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "architectures": ["Phi3ForCausalLM"],
}
_SPECIAL = ["<unk>", "<s>", "</s>", "<|user|>", "<|assistant|>", "<|system|>", "<|end|>"]
_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}"
    "{{ '<|' + message['role'] + '|>\\n' + message['content'] + '<|end|>\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>\\n' }}{% else %}{{ eos_token }}{% endif %}"
)
_WORDS = "the lamp in the kitchen is on now, turn it off and tell me the answer: hello world, what is it?"
_folders: list[tempfile.TemporaryDirectory[str]] = []


def _new_folder() -> Path:
    """A folder that lives as long as this process; models are made once for all tests."""
    _folders.append(tempfile.TemporaryDirectory(prefix="edgetune-tests-"))
    return Path(_folders[-1].name)


@cache
def checkpoint(variant: str) -> Path:
    """A Hugging Face folder with random weights that are large enough for varied answers."""
    return save_checkpoint(_new_folder() / variant, _MODELS[variant])


def save_checkpoint(folder: Path, changes: dict[str, Any]) -> Path:
    """Write a checkpoint whose configuration differs from the variants' common one by `changes`."""
    import torch
    from transformers import Phi3Config, Phi3ForCausalLM

    torch.manual_seed(0)
    model = Phi3ForCausalLM(Phi3Config(**_CONFIG | changes))
    for name, parameter in model.named_parameters():
        if parameter.dim() == 1:
            parameter.data.add_(0.1 * torch.randn_like(parameter))
        elif "embed_tokens" not in name:
            parameter.data.mul_(6)
    model.save_pretrained(folder)
    save_tokenizer(folder, [_WORDS] * 4, 440)
    return folder


def save_tokenizer(folder: Path, text: list[str], vocabulary: int) -> None:
    """A tokenizer like Phi-3's that knows the words of a text."""
    from tokenizers import Tokenizer as HfTokenizer
    from tokenizers import decoders, models, normalizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = HfTokenizer(models.BPE(byte_fallback=True, unk_token="<unk>", fuse_unk=True))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    octets = [f"<0x{value:02X}>" for value in range(256)]
    trainer = trainers.BpeTrainer(vocab_size=vocabulary, special_tokens=[*_SPECIAL, *octets], show_progress=False)
    tokenizer.train_from_iterator(text, trainer)
    record = json.loads(tokenizer.to_str())
    record["added_tokens"] = [token for token in record["added_tokens"] if token["content"] not in octets]
    saved = PreTrainedTokenizerFast(
        tokenizer_object=HfTokenizer.from_str(json.dumps(record)),
        bos_token="<s>",
        eos_token="</s>",
        unk_token="<unk>",
        pad_token="</s>",
        chat_template=_TEMPLATE,
    )
    saved.save_pretrained(folder)


@cache
def genai_model(variant: str, base: Base, quantiser: Quantiser = PrepareConfig.quantiser) -> Path:
    """The variant's GenAI folder."""
    return build_here(checkpoint(variant), _new_folder() / f"{variant}-{base}", base, quantiser)


def build_here(source: Path, folder: Path, base: Base, quantiser: Quantiser = PrepareConfig.quantiser) -> Path:
    """Build a GenAI folder in this process: its imports cost seconds, a build milliseconds."""
    from edgetune.host import olive_pass
    from edgetune.preparation import genai_model

    def run_here(
        name: str, config: dict[str, object], source: Path, output: Path, base: Base, quantiser: Quantiser
    ) -> None:
        stored = {"source": str(source), "output": str(output), "base": base, "quantiser": quantiser}
        olive_pass._serve(json.dumps({"name": name, "config": config, **stored}))

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("OLIVE_DISABLE_TELEMETRY", "1")
        patch.setattr(genai_model, "run_olive_pass", run_here)
        genai_model.build_genai_model(source, folder, base, quantiser)
    return folder


def lora(variant: str, rank: int = 4) -> Lora:
    """Slots on all projections."""
    config = _CONFIG | _MODELS[variant]
    hidden, inner = config["hidden_size"], config["intermediate_size"]
    packed = hidden + 2 * hidden // config["num_attention_heads"] * config["num_key_value_heads"]
    shapes = {
        "self_attn.qkv_proj": (hidden, packed),
        "self_attn.o_proj": (hidden, hidden),
        "mlp.gate_up_proj": (hidden, 2 * inner),
        "mlp.down_proj": (inner, hidden),
    }
    slots = [
        Slot(f"model.layers.{layer}.{name}", *shape)
        for layer in range(config["num_hidden_layers"])
        for name, shape in shapes.items()
    ]
    return Lora(rank, 2.0 * rank, [name.partition(".")[2] for name in shapes], slots)


@cache
def bundle(variant: str, base: Base) -> Bundle:
    """The GenAI folder with a manifest: all that export and generation look at."""
    folder = genai_model(variant, base)
    rope = Rope(32, 1e4, 1.0, None, None, 64)
    manifest = BundleManifest(
        format=BUNDLE_FORMAT,
        format_version=BUNDLE_VERSION,
        base=BaseModel(variant, sha256_of(checkpoint(variant) / "model.safetensors"), base),
        architecture=Architecture(128, 192, 2, 4, 4, 32, 448, 256, None, False, rope),
        tokenizer=Tokenizer(
            sha256=sha256_of(folder / "tokenizer.json"),
            chat_template_sha256=sha256_of(folder / "chat_template.jinja"),
            bos_token="<s>",
            eos_token="</s>",
            pad_token_id=2,
        ),
        lora=lora(variant),
        max_length=64,
        graphs=[],
        gradient_coverage={},
        provenance={},
        files=list_files(folder, without="manifest.json"),
    )
    seal_bundle(folder, manifest)
    return load_bundle(folder)


def parameters(variant: str) -> dict[str, NDArray[np.float32]]:
    """An adapter that changes the answers."""
    generator = np.random.default_rng(3)
    return {
        name: (0.15 * generator.standard_normal(shape)).astype(np.float32)
        for name, shape in lora(variant).shapes().items()
    }


def save_adapter(
    folder: Path,
    of: Bundle,
    provenance: dict[str, str] | None = None,
    values: dict[str, NDArray[np.float32]] | None = None,
) -> Path:
    """Write `parameters`, or other values, as `edgetune train` does."""
    folder.mkdir()
    base = of.manifest.base
    write_adapter(
        folder,
        base=base,
        tokenizer=of.manifest.tokenizer,
        lora=of.manifest.lora,
        parameters=values or parameters(base.name),
        provenance=provenance or {},
    )
    return folder


def weights(folder: Path) -> dict[str, NDArray[np.float32]]:
    """Every linear weight of a GenAI folder as (out_features, in_features), in float32 whatever it is stored as."""
    import onnx
    from onnx import numpy_helper

    model = onnx.load(folder / "model.onnx")
    tensors = {tensor.name: numpy_helper.to_array(tensor) for tensor in model.graph.initializer}
    casts = {node.output[0]: node.input[0] for node in model.graph.node if node.op_type == "Cast"}
    found: dict[str, NDArray[np.float32]] = {}
    for node in model.graph.node:
        stored = casts.get(node.input[1], node.input[1]) if len(node.input) > 1 else ""
        name, is_linear, _ = stored.partition(".MatMul.weight")
        if node.op_type == "MatMul" and is_linear and stored in tensors:
            found[name] = tensors[stored].T.astype(np.float32)
        if node.op_type == "MatMulNBits":
            (bits,) = (attribute.i for attribute in node.attribute if attribute.name == "bits")
            packed = tensors[stored]
            scales = tensors[node.input[2]].reshape(packed.shape[:2])
            nibbles = np.stack([packed % 16, packed // 16], axis=-1).reshape(*packed.shape[:2], -1)
            values = {4: nibbles, 8: packed}[bits].astype(np.float32) - 2 ** (bits - 1)
            found[name] = (values * scales[..., None]).reshape(packed.shape[0], -1)
    return found


def torch_model(variant: str, folder: Path) -> Any:
    """transformers' model of a variant with the linear weights of a GenAI folder."""
    return torch_model_of(checkpoint(variant), folder)


def torch_model_of(source: Path, folder: Path) -> Any:
    """transformers' model of a checkpoint with the linear weights of a GenAI folder."""
    import torch
    from transformers import Phi3ForCausalLM

    torch.set_num_threads(1)  # these models are too small for two
    model = Phi3ForCausalLM.from_pretrained(source).eval()
    linear = {name: torch.from_numpy(value.copy()) for name, value in weights(folder).items()}
    # A tied head is a copy of its own in the GenAI model, quantised there while the embedding is not.
    model.lm_head.weight = torch.nn.Parameter(linear["lm_head"])
    for index, layer in enumerate(model.model.layers):
        name = f"model.layers.{index}"
        gate_up = torch.cat([linear[f"{name}.mlp.gate_proj"], linear[f"{name}.mlp.up_proj"]])
        layer.self_attn.qkv_proj.weight.data = linear[f"{name}.attn.qkv_proj"]
        layer.self_attn.o_proj.weight.data = linear[f"{name}.attn.o_proj"]
        layer.mlp.gate_up_proj.weight.data = gate_up
        layer.mlp.down_proj.weight.data = linear[f"{name}.mlp.down_proj"]
    return model


def greedy(model: Any, input_ids: list[int], max_new_tokens: int) -> list[int]:
    """PyTorch's greedy continuation, without the end-of-sequence id."""
    import torch

    with torch.no_grad():
        ids = model.generate(torch.tensor([input_ids]), max_new_tokens=max_new_tokens, do_sample=False)
    return [int(token) for token in ids[0, len(input_ids) :] if token != model.config.eos_token_id]


def genai_greedy(folder: Path, input_ids: list[int], max_new_tokens: int) -> list[int]:
    """ONNX Runtime GenAI's greedy continuation."""
    import onnxruntime_genai as og

    model = og.Model(str(folder))
    parameters = og.GeneratorParams(model)
    parameters.set_search_options(do_sample=False, max_length=len(input_ids) + max_new_tokens)
    generator = og.Generator(model, parameters)
    generator.append_tokens(np.array(input_ids, np.int32))
    while not generator.is_done():
        generator.generate_next_token()
    return [int(token) for token in generator.get_sequence(0)[len(input_ids) :]]


Say = Callable[[str], None]


def silent(_: str) -> None:
    """Takes what a stage says."""
