"""What bundles, adapters and models say of themselves: classes that mirror the documented JSON, without any I/O.

The format is described in `artifacts/FORMAT.md`; `edgetune.formats.manifest_json` reads and writes it.
"""

from __future__ import annotations

import re
from collections.abc import Container
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Protocol

from edgetune.errors import VerificationError

BUNDLE_FORMAT = "edgetune-bundle"
ADAPTER_FORMAT = "edgetune-adapter"
MODEL_FORMAT = "edgetune-model"
TARGET_FORMAT = "edgetune-target"
FORMAT_VERSION = 1
_LAYER = re.compile(r"model\.layers\.(\d{1,6})\.")


@dataclass(frozen=True)
class BaseModel:
    """Which model the bundle was made from."""

    name: str
    """Hub id or folder name; for people."""
    sha256: str
    """Identity: SHA-256 over a line `NAME SHA256` for each of the checkpoint's safetensors files, in order of names."""
    weights: str
    """How the frozen weights are stored: `int4`, `int8`, `fp16` or `fp32`."""


@dataclass(frozen=True)
class Rope:
    """Rotary position embedding, as the training loop needs it (transformers' `modeling_rope_utils`)."""

    dim: int
    """Rotated dimensions of a head."""
    theta: float
    """Base of the frequencies."""
    attention_factor: float
    """Scale on cos and sin (longrope), 1 otherwise."""
    short_factor: list[float] | None
    """longrope: divisors of the frequencies up to `original_max_position_embeddings`, dim / 2 of them."""
    long_factor: list[float] | None
    """longrope: the same for longer rows."""
    original_max_position_embeddings: int
    """Longest row for which the short factors hold."""


@dataclass(frozen=True)
class Architecture:
    """Sizes of the Phi-3 model."""

    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    vocab_size: int
    max_position_embeddings: int
    sliding_window: int | None
    tie_word_embeddings: bool
    rope: Rope


@dataclass(frozen=True)
class Tokenizer:
    """What turns text into token ids, pinned by hash."""

    sha256: str
    """SHA-256 of `tokenizer.json`."""
    chat_template_sha256: str | None
    """SHA-256 of `chat_template.jinja`; none when the model has no template."""
    bos_token: str | None
    eos_token: str
    pad_token_id: int


@dataclass(frozen=True)
class RowEncoding:
    """How text becomes token ids where there is a choice: rows when they are trained, prompts when they are asked."""

    raw_prompts: bool = False
    """Prompts are taken as they are; otherwise they go through the chat template as the user's turn."""
    content_as_text: bool = False
    """Control tokens that a message spells are text; otherwise they steer, as in transformers."""

    def __or__(self, other: RowEncoding) -> RowEncoding:
        """What either asks for."""
        return RowEncoding(self.raw_prompts or other.raw_prompts, self.content_as_text or other.content_as_text)


@dataclass(frozen=True)
class Slot:
    """One projection that carries LoRA parameters A (rank, in_features) and B (out_features, rank)."""

    name: str
    """Module path in the checkpoint, such as `model.layers.0.self_attn.qkv_proj`."""
    in_features: int
    out_features: int

    @property
    def layer(self) -> int:
        """The decoder layer that it belongs to; 0 for a module outside of them."""
        found = _LAYER.match(self.name)
        return int(found[1]) if found else 0

    @property
    def a(self) -> str:
        """Name of the A parameter in every graph."""
        return f"{self.name}.lora_A.weight"

    @property
    def b(self) -> str:
        """Name of the B parameter in every graph."""
        return f"{self.name}.lora_B.weight"


@dataclass(frozen=True)
class Lora:
    """The trainable parameters."""

    rank: int
    alpha: float
    target_modules: list[str]
    slots: list[Slot]

    def __post_init__(self) -> None:
        if self.rank < 1:
            raise ValueError(f"rank is {self.rank}; expected at least 1")

    @property
    def scaling(self) -> float:
        """What B·A is multiplied with (Hu et al. 2021): alpha / rank."""
        return self.alpha / self.rank

    @property
    def highest_rank(self) -> int:
        """The features of the widest slot: no slot of a bundle has a higher rank."""
        return max((max(slot.in_features, slot.out_features) for slot in self.slots), default=self.rank)

    def layers(self) -> list[int]:
        """The decoder layers with slots, in order."""
        return sorted({slot.layer for slot in self.slots})

    def of_layers(self, layers: Container[int]) -> Lora:
        """The slots of these decoder layers."""
        return replace(self, slots=[slot for slot in self.slots if slot.layer in layers])

    def from_layer(self, first: int) -> Lora:
        """The slots of this decoder layer and those above it."""
        return self.of_layers([layer for layer in self.layers() if layer >= first])

    def shapes(self) -> dict[str, tuple[int, int]]:
        """Name and shape of every parameter, A before B, slot by slot."""
        shapes: dict[str, tuple[int, int]] = {}
        for slot in self.slots:
            shapes[slot.a] = (self.rank, slot.in_features)
            shapes[slot.b] = (slot.out_features, self.rank)
        return shapes


@dataclass(frozen=True)
class TensorSpec:
    """A graph input or output; symbolic dimensions are strings."""

    name: str
    dtype: str
    shape: list[int | str]


@dataclass(frozen=True)
class Graph:
    """One ONNX file of the bundle and its contract."""

    role: str
    file: str
    inputs: list[TensorSpec]
    outputs: list[TensorSpec]


@dataclass(frozen=True)
class File:
    """One file, with its size in bytes and its SHA-256."""

    path: str
    size: int
    sha256: str


@dataclass(frozen=True)
class BundleManifest:
    """`manifest.json` of a bundle."""

    FORMAT: ClassVar[str] = BUNDLE_FORMAT

    format: str
    format_version: int
    base: BaseModel
    architecture: Architecture
    tokenizer: Tokenizer
    lora: Lora
    max_length: int
    graphs: list[Graph]
    gradient_coverage: dict[str, int]
    """Operators between the LoRA parameters and the loss, and how often each occurs; all have a gradient."""
    provenance: dict[str, str]
    """Tool versions that made the bundle, and the `revision` of a checkpoint that lay in the hub's cache."""
    files: list[File]
    manifest_sha256: str = ""
    """SHA-256 of this manifest written with an empty value here."""

    def graph(self, role: str) -> Graph:
        """The graph that plays `role`.

        Raises:
            VerificationError: The bundle has none.
        """
        for graph in self.graphs:
            if graph.role == role:
                return graph
        raise VerificationError(f"the bundle's manifest lists no graph for {role!r}; make the bundle anew")


@dataclass(frozen=True)
class AdapterManifest:
    """`edgetune.json` of an adapter: the contract with its base, checked before anything is loaded."""

    FORMAT: ClassVar[str] = ADAPTER_FORMAT

    format: str
    format_version: int
    base: BaseModel
    tokenizer: Tokenizer
    lora: Lora
    provenance: dict[str, str]
    files: list[File]
    encoding: RowEncoding = RowEncoding()
    """How its rows were encoded; not written where it is the default."""
    manifest_sha256: str = ""


@dataclass(frozen=True)
class ModelManifest:
    """`edgetune.json` of an exported GenAI folder."""

    FORMAT: ClassVar[str] = MODEL_FORMAT

    format: str
    format_version: int
    base: BaseModel
    """What the model was made from; `base.weights` is how the bundle stored them."""
    tokenizer: Tokenizer
    lora: Lora
    weights: str
    """How this folder stores its weights: `int4` or `fp32` when merged, otherwise as `base.weights`."""
    adapter: str | None
    """The `.onnx_adapter` that is active unless another is asked for; none when it was merged into the weights."""
    losses: dict[str, float]
    """Answer loss on the validation rows of `base`, `base + adapter` and `merged`; empty when there were no rows."""
    provenance: dict[str, str]
    files: list[File]
    encoding: RowEncoding = RowEncoding()
    """How prompts are encoded, as the adapter's rows were; not written where it is the default."""
    manifest_sha256: str = ""


class Manifest(Protocol):
    """What every manifest has; `edgetune.ship.manifest` adds another."""

    __dataclass_fields__: ClassVar[dict[str, Any]]
    FORMAT: ClassVar[str]
    """What the key `format` says."""

    @property
    def manifest_sha256(self) -> str:
        """SHA-256 of the manifest written with an empty value here."""
