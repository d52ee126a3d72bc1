"""`target.json`: what an app needs to know of a shipped folder. Described in `artifacts/FORMAT.md`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from edgetune.formats.manifest import FORMAT_VERSION, SHIPPED_FORMAT, BaseModel, Graph, TensorSpec
from edgetune.model.architecture import Architecture
from edgetune.model.lora import Lora

KINDS: dict[str, str] = {
    "input_ids": "token ids, padded on the right with tokenizer.pad_token_id",
    "labels": "the token that shall follow each position; -100 where nothing is trained",
    "attn_bias": "0 where a position may look at another, -10000 elsewhere",
    "rope_cos": "cosines of the rotary embedding, of both halves",
    "rope_sin": "sines of the rotary embedding, of both halves",
    "loss_scale": "the gradients are multiplied by it; 1 for a plain step",
    "loss": "mean cross entropy in nats over the labels that are not -100",
    "predictions": "the likeliest token to follow each position",
    "learning_rate": "step size of AdamW",
    "weight_decay": "decoupled weight decay of AdamW",
    "max_grad_norm": "gradients are scaled down to this global 2-norm; 0 for no clipping",
    "step": "number of the optimizer step, 1 for the first",
    "grad_norm": "global 2-norm of the gradients before clipping; where it or the loss is not finite, drop the step",
    "parameter": "a LoRA parameter",
    "parameter.grad": "its gradient, of loss x loss_scale",
    "parameter.exp_avg": "its first moment, zeros at the start",
    "parameter.exp_avg_sq": "its second moment, zeros at the start",
    "parameter.next": "its value for the next step",
    "parameter.exp_avg.next": "its first moment for the next step",
    "parameter.exp_avg_sq.next": "its second moment for the next step",
}
"""What a tensor can be, and what that means."""
_PARAMETER = "parameter"


@dataclass(frozen=True)
class Tensor:
    """An input or output of a graph."""

    name: str
    dtype: str
    """As ONNX calls it, in lower case: `float` has 32 bits."""
    shape: list[int | str]
    """Symbolic dimensions are strings."""
    kind: str
    """A key of `kinds`."""
    parameter: str | None
    """The LoRA parameter that it belongs to."""


@dataclass(frozen=True)
class ShippedGraph:
    """One ONNX file and its contract."""

    role: str
    """`step`, `loss` or `adamw`."""
    file: str
    inputs: list[Tensor]
    outputs: list[Tensor]


@dataclass(frozen=True)
class Text:
    """What turns text into token ids and back."""

    file: str
    """For the tokenizers of Hugging Face."""
    chat_template: str | None
    """File of the Jinja template, if the model has one."""
    bos_token: str | None
    bos_token_id: int | None
    eos_token: str
    eos_token_id: int
    """Training ends every row with it."""
    stop_token_ids: list[int]
    """Each of them ends an answer."""
    pad_token_id: int


@dataclass(frozen=True)
class Optimizer:
    """AdamW as `adamw.onnx` computes it, and edgetune's defaults for its inputs."""

    beta1: float
    beta2: float
    epsilon: float
    learning_rate: float
    weight_decay: float
    max_grad_norm: float


@dataclass(frozen=True)
class Adapter:
    """The LoRA parameters that the app starts from, in PEFT's format."""

    file: str
    """A safetensors file with every parameter in float32."""
    prefix: str
    """Stands before a parameter's name in it."""


@dataclass(frozen=True)
class Budget:
    """One limit of the platform that the folder is shipped to."""

    what: str
    """What is counted."""
    used: int
    """Bytes of this folder."""
    limit: int
    """Bytes."""
    source: str
    """Who says so."""


@dataclass(frozen=True)
class ShippedFile:
    """One file, with its size in bytes and its SHA-256."""

    path: str
    """In the folder that the app opens."""
    size: int
    sha256: str
    pack: str | None
    """The asset pack that it lies in: `PACK/src/main/assets/PATH`. None: it lies at `path`."""


@dataclass(frozen=True)
class ShippedManifest:
    """`target.json`."""

    FORMAT: ClassVar[str] = SHIPPED_FORMAT
    VERSIONS: ClassVar[tuple[int, ...]] = (FORMAT_VERSION,)

    format: str
    format_version: int
    target: str
    """The platform; the key is older than this name for it."""
    base: BaseModel
    architecture: Architecture
    tokenizer: Text
    lora: Lora
    max_length: int
    """Longest row, in tokens, that edgetune itself would train on."""
    kinds: dict[str, str]
    graphs: list[ShippedGraph]
    weights: list[str]
    """Files that the graphs take their weights from; they name them without the folder."""
    optimizer: Optimizer
    adapter: Adapter
    sizes: dict[str, int]
    """Bytes of `graphs`, `weights`, `adapter` and `text`."""
    budgets: list[Budget]
    provenance: dict[str, str]
    files: list[ShippedFile]
    """All but this one."""
    manifest_sha256: str = ""


def describe_graph(graph: Graph, file: str, lora: Lora) -> ShippedGraph:
    """The contract of a bundle's graph, with what each tensor is."""
    parameters = {}
    for name in lora.shapes():
        for kind in KINDS:
            if kind.startswith(_PARAMETER):
                parameters[name + kind.removeprefix(_PARAMETER)] = (kind, name)

    def described(spec: TensorSpec) -> Tensor:
        kind, parameter = parameters.get(spec.name, (spec.name, None))
        if kind not in KINDS:
            raise ValueError(f"{graph.file} has a tensor {spec.name!r}")
        return Tensor(spec.name, spec.dtype, spec.shape, kind, parameter)

    return ShippedGraph(graph.role, file, [described(s) for s in graph.inputs], [described(s) for s in graph.outputs])
