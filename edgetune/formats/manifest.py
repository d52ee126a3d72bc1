"""What bundles, adapters and models say of themselves: classes that mirror the documented JSON, without any I/O.

The format is described in `artifacts/FORMAT.md`; `edgetune.formats.manifest_json` reads and writes it.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, ClassVar, Protocol

from edgetune.errors import VerificationError
from edgetune.model.architecture import Architecture
from edgetune.model.lora import Lora

BUNDLE_FORMAT = "edgetune-bundle"
ADAPTER_FORMAT = "edgetune-adapter"
MODEL_FORMAT = "edgetune-model"
SHIPPED_FORMAT = "edgetune-target"
FORMAT_VERSION = 1
"""Of adapters, models and shipped folders."""
BUNDLE_VERSION = 2
"""Of bundles. In those of version 1 int8 rows are not rotated."""
ROW_NORMS = "row_norms.data"
"""Of a bundle with DoRA; see `edgetune.formats.row_norms`."""


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
    VERSIONS: ClassVar[tuple[int, ...]] = (1, BUNDLE_VERSION)

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
    """Tool versions that made the bundle, the `revision` of a checkpoint that lay in the hub's cache, and the
    `quantiser` of an int4 base."""
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
    VERSIONS: ClassVar[tuple[int, ...]] = (FORMAT_VERSION,)

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
    VERSIONS: ClassVar[tuple[int, ...]] = (FORMAT_VERSION,)

    format: str
    format_version: int
    base: BaseModel
    """What the model was made from; `base.weights` is how the bundle stored them."""
    tokenizer: Tokenizer
    lora: Lora
    weights: str
    """How this folder stores its weights: `fp32`, `int8` or `int4` when merged, otherwise as `base.weights`."""
    adapter: str | None
    """The `.onnx_adapter` that is active unless another is asked for; none when it was merged into the weights."""
    losses: dict[str, float]
    """Answer loss on the validation rows of `base`, `base + adapter`, and each `merged PRECISION` that was measured;
    empty when there were no rows. Of several adapters, `base, rows of NAME` and `base + NAME` for each that has rows.
    """
    provenance: dict[str, str]
    files: list[File]
    encoding: RowEncoding = RowEncoding()
    """How prompts are encoded, as the adapter's rows were; not written where it is the default."""
    adapters: dict[str, RowEncoding] = field(default_factory=dict)
    """Of a folder with several adapters, how prompts of each are encoded, by its name, which is that of its file; not
    written otherwise."""
    manifest_sha256: str = ""


class Manifest(Protocol):
    """What every manifest has; `edgetune.ship.manifest` adds another."""

    __dataclass_fields__: ClassVar[dict[str, Any]]
    FORMAT: ClassVar[str]
    """What the key `format` says."""
    VERSIONS: ClassVar[tuple[int, ...]]
    """Format versions that are read."""

    @property
    def manifest_sha256(self) -> str:
        """SHA-256 of the manifest written with an empty value here."""
