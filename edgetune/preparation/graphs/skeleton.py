"""Exports of a model's skeleton with Optimum: modules of Phi-3 with LoRA slots whose parameters are graph inputs.

No weight is read or written, so a model of any size exports in seconds and a few megabytes.
"""

from __future__ import annotations

import logging
import warnings
from collections.abc import Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edgetune.config import PrepareConfig
from edgetune.preparation.slots import lora_of

if TYPE_CHECKING:
    from collections.abc import Iterator

    import torch
    from transformers import Phi3ForCausalLM

OPSET = 18
"""What the exporter writes; the gradient step lifts it to 21, which changes no operator that occurs."""
_ATTENTION = "edgetune"
Axes = dict[int, str]
ROWS: Axes = {0: "batch", 1: "sequence"}
SCORES: Axes = {0: "batch", 2: "sequence", 3: "sequence"}
EXAMPLE_BATCH, EXAMPLE_SEQUENCE = 2, 8


@dataclass(frozen=True)
class Argument:
    """A graph input that is not a parameter."""

    axes: Axes
    """Names of the symbolic dimensions."""
    example: torch.Tensor
    """The tensor that the exporter traces with."""


@dataclass(frozen=True)
class Parameters:
    """Parameters that were taken out of a module: their names, their shapes, and where they belong."""

    names: tuple[str, ...]
    shapes: tuple[tuple[int, ...], ...]
    places: tuple[tuple[torch.nn.Module, str], ...]

    def put(self, values: list[torch.Tensor]) -> None:
        """Let the module compute with `values`, in the order of `names`."""
        for (module, leaf), value in zip(self.places, values, strict=True):
            module.__dict__[leaf] = value


def skeleton(checkpoint: Path, config: PrepareConfig, layers: int | None = None) -> Phi3ForCausalLM:
    """A Phi-3 model without weights, with LoRA slots.

    Args:
        checkpoint: Folder with a Phi-3 `config.json`; no weight is read.
        config: Rank, alpha and targets of the slots.
        layers: Number of decoder layers; all of the model when it is not given.
    """
    import torch
    from peft import LoraConfig, inject_adapter_in_model
    from transformers import AttentionInterface, AutoConfig, Phi3ForCausalLM

    architecture = AutoConfig.from_pretrained(checkpoint, trust_remote_code=False)
    AttentionInterface.register(_ATTENTION, _attention)
    architecture._attn_implementation = _ATTENTION
    architecture.use_cache = False
    # A tied head is quantised apart from the embedding: two frozen tensors.
    architecture.tie_word_embeddings = False
    if layers is not None:
        architecture.num_hidden_layers = layers
    lora = lora_of(config)
    with torch.device("meta"):
        model = Phi3ForCausalLM(architecture)
        adapter = LoraConfig(
            r=lora.rank,
            lora_alpha=lora.alpha,
            target_modules=lora.target_modules,
            use_rslora=lora.rank_stabilised,
            rank_pattern=lora.rank_pattern,
            alpha_pattern=lora.alpha_pattern,
        )
        inject_adapter_in_model(adapter, model)
    _scale_early(model)
    if config.dora:
        _add_gains(model)
    model.eval()
    return model


def _scale_early(model: torch.nn.Module) -> None:
    """Let what scales an update scale the few columns that A gives, not the many that B makes of them."""
    from peft.tuners.lora import Linear

    for slot in (module for module in model.modules() if isinstance(module, Linear)):
        for name, scaling in slot.scaling.items():
            slot.lora_A[name].register_forward_hook(lambda _module, _inputs, output, s=scaling: output * s)
            slot.scaling[name] = 1


def _add_gains(model: torch.nn.Module) -> None:
    """Multiply what each slot gives with a parameter `lora_gain` (out_features,)."""
    import torch
    from peft.tuners.lora import Linear

    for slot in (module for module in model.modules() if isinstance(module, Linear)):
        slot.register_parameter("lora_gain", torch.nn.Parameter(torch.empty(slot.out_features, device="meta")))
        slot.register_forward_hook(lambda module, _inputs, output: output * module.lora_gain)


def _attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor,
    scaling: float,
    **_: object,
) -> tuple[torch.Tensor, None]:
    """Attention as in transformers' eager form, except that the query is scaled instead of the scores.

    Args:
        module: Has `num_key_value_groups`, the query heads that share a key.
        query: (batch, heads, sequence, head_dim).
        key: (batch, key-value heads, sequence, head_dim).
        value: (batch, key-value heads, sequence, head_dim).
        attention_mask: (batch, 1, sequence, sequence), added to the scores.
        scaling: The factor on the scores.
    """
    import torch
    from transformers.models.phi3.modeling_phi3 import repeat_kv

    key, value = (repeat_kv(states, module.num_key_value_groups) for states in (key, value))
    scores = (query * scaling) @ key.transpose(2, 3) + attention_mask
    module.context = torch.softmax(scores, dim=-1) @ value
    return module.context.transpose(1, 2), None


def take_parameters(module: torch.nn.Module, keep: tuple[str, ...] = ("",)) -> Parameters:
    """Take the parameters out of a module, so that they can come in as arguments.

    Args:
        module: The module; it is changed.
        keep: Take only parameters whose names begin with one of these.
    """
    taken = [(name, parameter) for name, parameter in module.named_parameters() if name.startswith(keep)]
    places = [(module.get_submodule(name.rpartition(".")[0]), name.rpartition(".")[2]) for name, _ in taken]
    for owner, leaf in places:
        del owner._parameters[leaf]
    names = (name.replace(".base_layer.", ".").replace(".default.", ".") for name, _ in taken)
    return Parameters(tuple(names), tuple(tuple(parameter.shape) for _, parameter in taken), tuple(places))


def rotary_arguments(architecture: Any) -> dict[str, Argument]:
    """`attn_bias`, `rope_cos` and `rope_sin`: the loop makes them, so that the graph computes no mask and no angle."""
    import torch

    head_dim = getattr(architecture, "head_dim", None) or architecture.hidden_size // architecture.num_attention_heads
    rotated = int(head_dim * (getattr(architecture, "partial_rotary_factor", None) or 1.0))
    table = torch.ones(EXAMPLE_BATCH, EXAMPLE_SEQUENCE, rotated)
    bias = torch.zeros(EXAMPLE_BATCH, 1, EXAMPLE_SEQUENCE, EXAMPLE_SEQUENCE)
    return {
        "attn_bias": Argument(SCORES, bias),
        "rope_cos": Argument(ROWS, table),
        "rope_sin": Argument(ROWS, table.clone()),
    }


def export_module(
    module: torch.nn.Module,
    parameters: Parameters,
    arguments: Mapping[str, Argument],
    outputs: Mapping[str, Axes],
    output: Path,
) -> None:
    """Export with Optimum.

    Args:
        module: Has `config`; `forward` takes the arguments by name, then the list `weights`, ordered as `parameters`.
        parameters: The parameters that `weights` holds.
        arguments: All other inputs, by name.
        outputs: Names and symbolic dimensions of the tensors that `forward` returns.
        output: The ONNX file to write.
    """
    import torch
    from optimum.exporters.onnx import export
    from optimum.exporters.onnx.base import OnnxConfig
    from optimum.utils import NormalizedTextConfig

    inputs = {name: argument.axes for name, argument in arguments.items()}
    weights = {f"weights.{name}": name for name in parameters.names}
    returned = dict(outputs)

    class SkeletonOnnxConfig(OnnxConfig):  # type: ignore[misc]
        NORMALIZED_CONFIG_CLASS = NormalizedTextConfig
        DUMMY_INPUT_GENERATOR_CLASSES = ()

        @property
        def inputs(self) -> dict[str, Axes]:
            return {**inputs, **{name: {} for name in weights}}

        @property
        def outputs(self) -> dict[str, Axes]:
            return returned

        @property
        def torch_to_onnx_input_map(self) -> dict[str, str]:
            return weights

        def generate_dummy_inputs(self, framework: str = "pt", **_: object) -> dict[str, Any]:
            examples: dict[str, Any] = {name: argument.example for name, argument in arguments.items()}
            # Expanded from one number: a tensor of any shape in four bytes.
            return {**examples, "weights": [torch.zeros(1).expand(shape) for shape in parameters.shapes]}

    with _quiet_exporter():
        description = SkeletonOnnxConfig(module.config, task="text-generation")
        export(module, description, output, opset=OPSET, disable_dynamic_axes_fix=True)


@contextmanager
def _quiet_exporter() -> Iterator[None]:
    """The TorchScript exporter warns of its own deprecation and of shapes that are constant on purpose."""
    previous = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(previous)
