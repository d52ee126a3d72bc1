"""The forward graph: Optimum exports a Phi-3 model with LoRA slots, as a skeleton without any weight.

Every parameter is a graph input, so a model of any size exports in seconds and a few megabytes. Attention mask and
rotary tables are inputs too: the loop makes them, and the graph holds no IsNaN, no Range and no trigonometry.
"""

from __future__ import annotations

import logging
import warnings
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edgetune.config import MODULES_OF_TARGETS, PrepareConfig
from edgetune.manifest import Lora, Slot

if TYPE_CHECKING:
    from collections.abc import Iterator

    import torch

OPSET = 18
"""What the exporter writes; the gradient step lifts it to 21, which changes no operator that occurs."""


def lora_parameter_name(name: str) -> str:
    """Name in the graphs of a parameter of the PEFT-injected model."""
    return name.replace(".base_layer.", ".").replace(".default.", ".")


def export_forward(checkpoint: Path, output: Path, config: PrepareConfig) -> Lora:
    """Export loss and logits of the checkpoint's architecture with LoRA slots.

    Inputs: `input_ids`, `labels` (batch, sequence), `attn_bias` (batch, 1, sequence, sequence), `rope_cos`, `rope_sin`
    (batch, sequence, rotated), `loss_scale` (1), then every parameter under its name in the checkpoint. Outputs:
    `objective` = loss · loss_scale, `loss` (1), `logits` (batch, sequence, vocabulary).

    Args:
        checkpoint: Folder with a Phi-3 `config.json`; no weight is read.
        output: The ONNX file to write.
        config: Rank, alpha and targets of the slots.

    Returns:
        The slots, in the order of the layers.
    """
    import torch
    from optimum.exporters.onnx import export
    from peft import LoraConfig, inject_adapter_in_model
    from transformers import AutoConfig, Phi3ForCausalLM

    architecture = AutoConfig.from_pretrained(checkpoint, trust_remote_code=False)
    architecture._attn_implementation = "eager"
    architecture.use_cache = False
    # A tied head is quantised apart from the embedding: two frozen tensors.
    architecture.tie_word_embeddings = False
    modules = MODULES_OF_TARGETS[config.targets]
    with torch.device("meta"):
        model = Phi3ForCausalLM(architecture)
        slots = [
            Slot(name, module.in_features, module.out_features)
            for name, module in model.named_modules()
            if name.rpartition(".")[2] in modules and isinstance(module, torch.nn.Linear)
        ]
        adapter = LoraConfig(r=config.rank, lora_alpha=config.alpha, target_modules=list(modules))
        inject_adapter_in_model(adapter, model)
    model.eval()
    forward = _forward_module(model)
    with _quiet_exporter():
        export(
            forward,
            _onnx_config(forward, architecture),
            output,
            opset=OPSET,
            disable_dynamic_axes_fix=True,
        )
    return Lora(config.rank, config.alpha, list(modules), slots)


def _forward_module(model: torch.nn.Module) -> Any:
    """Wrap the model so that its parameters, mask and rotary tables come in as arguments."""
    import torch

    names = [name for name, _ in model.named_parameters()]
    shapes = [tuple(parameter.shape) for _, parameter in model.named_parameters()]
    places = [(model.get_submodule(name.rpartition(".")[0]), name.rpartition(".")[2]) for name in names]
    for module, leaf in places:
        del module._parameters[leaf]

    class GivenTables(torch.nn.Module):
        """Stands in for the rotary embedding: the tables are inputs."""

        tables: tuple[torch.Tensor, torch.Tensor]

        def forward(self, x: torch.Tensor, position_ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            return self.tables

    rotary = GivenTables()
    model.get_submodule("model").rotary_emb = rotary

    class TrainingForward(torch.nn.Module):
        config: Any = model.config
        weight_names = tuple(lora_parameter_name(name) for name in names)
        weight_shapes = tuple(shapes)

        def forward(
            self,
            input_ids: torch.Tensor,
            labels: torch.Tensor,
            attn_bias: torch.Tensor,
            rope_cos: torch.Tensor,
            rope_sin: torch.Tensor,
            loss_scale: torch.Tensor,
            weights: list[torch.Tensor],
        ) -> dict[str, torch.Tensor]:
            for (module, leaf), weight in zip(places, weights, strict=True):
                module.__dict__[leaf] = weight
            rotary.tables = (rope_cos, rope_sin)
            positions = torch.zeros(1, 1, dtype=torch.int64)
            logits = model(
                input_ids=input_ids, attention_mask=attn_bias, position_ids=positions, use_cache=False
            ).logits
            loss = torch.nn.functional.cross_entropy(
                logits.reshape(-1, logits.shape[-1]), labels.reshape(-1), ignore_index=-100
            ).reshape(1)
            return {"objective": loss * loss_scale, "loss": loss, "logits": logits}

    return TrainingForward()


def _onnx_config(forward: Any, architecture: Any) -> Any:
    """Optimum's description of the graph: inputs, outputs, dynamic axes and example tensors."""
    import torch
    from optimum.exporters.onnx.base import OnnxConfig
    from optimum.utils import NormalizedTextConfig

    head_dim = getattr(architecture, "head_dim", None) or architecture.hidden_size // architecture.num_attention_heads
    rotated = int(head_dim * (getattr(architecture, "partial_rotary_factor", None) or 1.0))
    rows = {0: "batch", 1: "sequence"}

    class TrainingOnnxConfig(OnnxConfig):  # type: ignore[misc]
        NORMALIZED_CONFIG_CLASS = NormalizedTextConfig
        DUMMY_INPUT_GENERATOR_CLASSES = ()

        @property
        def inputs(self) -> dict[str, dict[int, str]]:
            return {
                "input_ids": rows,
                "labels": rows,
                "attn_bias": {0: "batch", 2: "sequence", 3: "sequence"},
                "rope_cos": rows,
                "rope_sin": rows,
                "loss_scale": {},
                **{f"weights.{name}": {} for name in forward.weight_names},
            }

        @property
        def outputs(self) -> dict[str, dict[int, str]]:
            return {"objective": {}, "loss": {}, "logits": rows}

        @property
        def torch_to_onnx_input_map(self) -> dict[str, str]:
            return {f"weights.{name}": name for name in forward.weight_names}

        def generate_dummy_inputs(self, framework: str = "pt", **_: object) -> dict[str, Any]:
            batch, sequence = 2, 8
            return {
                "input_ids": torch.ones(batch, sequence, dtype=torch.int64),
                "labels": torch.ones(batch, sequence, dtype=torch.int64),
                "attn_bias": torch.zeros(batch, 1, sequence, sequence),
                "rope_cos": torch.ones(batch, sequence, rotated),
                "rope_sin": torch.zeros(batch, sequence, rotated),
                "loss_scale": torch.ones(1),
                # Expanded from one number: a tensor of any shape in four bytes.
                "weights": [torch.zeros(1).expand(shape) for shape in forward.weight_shapes],
            }

    return TrainingOnnxConfig(architecture, task="text-generation")


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
