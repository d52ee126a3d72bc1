"""Adapters as other tools leave them, of a tiny model, and a bundle for it that holds no more than its manifest."""

from __future__ import annotations

import gzip
import hashlib
import io
import json
import tarfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from safetensors.numpy import load_file, save_file

from edgetune.formats.adapter import CONFIG, WEIGHTS
from edgetune.formats.bundle import Bundle
from edgetune.formats.manifest import BUNDLE_FORMAT, BUNDLE_VERSION, ROW_NORMS, BaseModel, BundleManifest, Tokenizer
from edgetune.model.architecture import Architecture, slots_of
from edgetune.model.lora import Lora
from edgetune.model.rope import Rope

ALL = ["qkv_proj", "o_proj", "gate_up_proj", "down_proj"]
APART = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
"""What Llama calls the same projections."""
ARCHITECTURE = Architecture(32, 48, 2, 4, 2, 8, 40, 64, None, False, Rope(8, 1e4, 1.0, None, None, 64))
"""With grouped queries: 32 rows are the queries', 16 the keys' and 16 the values'."""
ROWS = {
    "qkv_proj": {"q_proj": (0, 32), "k_proj": (32, 48), "v_proj": (48, 64)},
    "gate_up_proj": {"gate_proj": (0, 48), "up_proj": (48, 96)},
}
"""Which rows of a fused projection are whose."""
BASE = BaseModel("org/tiny-phi3", "a" * 64, "fp32")
TOKENIZER = Tokenizer("1" * 64, None, None, "<|end|>", 0)
Arrays = dict[str, NDArray[np.float32]]


def lora_of(rank: int = 16, alpha: float = 32.0, targets: list[str] = ALL, **fields: Any) -> Lora:
    """Slots of the tiny model."""
    return Lora(rank, alpha, targets, slots_of(ARCHITECTURE, targets), **fields)


def bundle_of(lora: Lora, folder: Path, norms: Mapping[str, NDArray[np.float32]] | None = None) -> Bundle:
    """What importing looks at of a bundle: its manifest and, with DoRA, its row norms."""
    folder.mkdir(exist_ok=True)
    if norms is not None:
        (folder / ROW_NORMS).write_bytes(b"".join(norms[slot.name].astype("<f4").tobytes() for slot in lora.slots))
    manifest = BundleManifest(
        format=BUNDLE_FORMAT,
        format_version=BUNDLE_VERSION,
        base=BASE,
        architecture=ARCHITECTURE,
        tokenizer=TOKENIZER,
        lora=lora,
        max_length=64,
        graphs=[],
        gradient_coverage={},
        provenance={},
        files=[],
    )
    return Bundle(folder, manifest)


def torch_model(*, apart: bool = False) -> Any:
    """The tiny model as transformers has it, or a Llama of the same sizes, whose projections are not fused."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM, Phi3Config, Phi3ForCausalLM

    torch.manual_seed(0)
    a = ARCHITECTURE
    sizes: dict[str, Any] = {
        "hidden_size": a.hidden_size,
        "intermediate_size": a.intermediate_size,
        "num_hidden_layers": a.num_hidden_layers,
        "num_attention_heads": a.num_attention_heads,
        "num_key_value_heads": a.num_key_value_heads,
        "vocab_size": a.vocab_size,
        "pad_token_id": 0,
    }
    model = LlamaForCausalLM(LlamaConfig(**sizes)) if apart else Phi3ForCausalLM(Phi3Config(**sizes))
    return model.eval()


def peft_model(model: Any, **options: Any) -> Any:
    """An adapter of PEFT on a model, with A and B as training leaves them."""
    import torch
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(1)
    wrapped = get_peft_model(model, LoraConfig(task_type="CAUSAL_LM", **options))
    for name, parameter in wrapped.named_parameters():
        if ".lora_A" in name or ".lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.2)
        elif ".lora_magnitude" in name:
            parameter.data.mul_(1 + 0.2 * torch.rand_like(parameter))
    return wrapped.eval()


def deltas(model: Any) -> Arrays:
    """PEFT's own change of each weight, by the module's path in the checkpoint."""
    return {
        name.removeprefix("base_model.model."): module.get_delta_weight("default").detach().float().numpy()
        for name, module in model.named_modules()
        if hasattr(module, "get_delta_weight")
    }


def fused(apart: Arrays) -> Arrays:
    """Changes of projections apart as those of the fused ones, with zeros where there are none."""
    found: Arrays = {}
    for name, value in apart.items():
        parent, _, last = name.rpartition(".")
        owner = next((whole for whole, rows in ROWS.items() if last in rows), None)
        if owner is None:
            found[name] = value
            continue
        whole = found.setdefault(
            f"{parent}.{owner}", np.zeros((max(end for _, end in ROWS[owner].values()), value.shape[1]), np.float32)
        )
        start, end = ROWS[owner][last]
        whole[start:end] = value
    return found


def write_peft(folder: Path, lora: Lora, seed: int = 0, **config: Any) -> Path:
    """What PEFT would have saved of plain LoRA, without the time PEFT takes."""
    folder.mkdir(parents=True)
    generator = np.random.default_rng(seed)
    tensors = {
        f"base_model.model.{name}": generator.normal(size=shape).astype(np.float32)
        for name, shape in lora.shapes().items()
    }
    save_file(tensors, folder / WEIGHTS)
    said = {"peft_type": "LORA", "r": lora.rank, "lora_alpha": lora.alpha, "bias": "none"}
    (folder / CONFIG).write_text(json.dumps(said | {"use_dora": lora.dora} | config))
    return folder


def as_mlx(peft: Path, folder: Path, scale: float, rank: int, **config: Any) -> Path:
    """The adapter of a PEFT folder as mlx-lm writes it: transposed, under its names, with a scale of its own."""
    folder.mkdir()
    names = {".lora_A.weight": ".lora_a", ".lora_B.weight": ".lora_b", ".lora_magnitude_vector": ".m"}
    tensors = {}
    for name, value in load_file(peft / WEIGHTS).items():
        end = next(end for end in names if name.endswith(end))
        tensors[name.removeprefix("base_model.model.").removesuffix(end) + names[end]] = np.ascontiguousarray(value.T)
    save_file(tensors, folder / "adapters.safetensors")
    said = {
        "model": "org/tiny-phi3",
        "fine_tune_type": "lora",
        "num_layers": 16,
        "lora_parameters": {"rank": rank, "scale": scale, "dropout": 0.0},
    }
    (folder / CONFIG).write_text(json.dumps(said | config))
    return folder


def tar_of(files: Mapping[str, bytes | Path], *, gzipped: bool = False, **options: Any) -> bytes:
    """A tar archive, as Python's library writes it."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", **options) as archive:
        for name, content in files.items():
            data = content.read_bytes() if isinstance(content, Path) else content
            member = tarfile.TarInfo(name)
            member.size = len(data)
            archive.addfile(member, io.BytesIO(data))
    return gzip.compress(buffer.getvalue()) if gzipped else buffer.getvalue()


def oci_layout(folder: Path, layers: list[bytes], **index: Any) -> Path:
    """An image as `skopeo copy` and `oras copy` lay it out."""
    (folder / "blobs" / "sha256").mkdir(parents=True)

    def blob(data: bytes) -> dict[str, Any]:
        digest = hashlib.sha256(data).hexdigest()
        (folder / "blobs" / "sha256" / digest).write_bytes(data)
        return {"digest": f"sha256:{digest}", "size": len(data)}

    manifest = {"schemaVersion": 2, "config": blob(b"{}"), "layers": [blob(layer) for layer in layers]}
    entry = blob(json.dumps(manifest).encode())
    (folder / "oci-layout").write_text('{"imageLayoutVersion": "1.0.0"}')
    (folder / "index.json").write_text(json.dumps({"schemaVersion": 2, "manifests": [entry]} | index))
    return folder


def archived(folder: Path) -> dict[str, bytes | Path]:
    """The files of a folder, for `tar_of`."""
    return {path.relative_to(folder).as_posix(): path for path in sorted(folder.rglob("*")) if path.is_file()}


def docker_archive(layers: list[bytes]) -> bytes:
    """An image as older `docker save` writes it."""
    names = [f"{hashlib.sha256(layer).hexdigest()}/layer.tar" for layer in layers]
    manifest = json.dumps([{"Config": "config.json", "RepoTags": ["a:b"], "Layers": names}]).encode()
    return tar_of({**dict(zip(names, layers, strict=True)), "config.json": b"{}", "manifest.json": manifest})
