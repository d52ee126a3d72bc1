"""How a training step is executed: what is kept in memory, what is computed again, and in which precision."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from edgetune.config import DeviceType, PlanName, Sharding, TrainingPrecision
from edgetune.model.dynamic_code import BYTES_A_NUMBER
from edgetune.model.lora import Lora, layers_text
from edgetune.text.byte_size import bytes_text

Precision = Literal["fp32", "bf16", "int8"]
"""In which products are computed."""
_FLOAT_BYTES = 4
"""Bytes of a float32."""


@dataclass(frozen=True)
class Accelerator:
    """What executes a whole step whose shapes are static."""

    device_type: DeviceType = "auto"
    """Which of a runtime's devices."""
    soc_model: int | None = None
    """Qualcomm's number of the chip that is compiled for where no NPU is found; the runtime's choice without it."""
    require: bool = False
    """Refuse a graph of which a node falls back to the CPU."""


@dataclass(frozen=True)
class Accelerating:
    """What a runtime with an accelerator takes, whether it is installed or not."""

    plans: tuple[PlanName, ...]
    """With which it compiles the whole step for static shapes."""
    precisions: tuple[TrainingPrecision, ...]
    """In which the whole step's frozen weights can be."""
    alone: bool
    """Whether it executes no other plan."""
    device_types: tuple[DeviceType, ...]
    """Its devices; the first is what `auto` means."""
    soc_model: bool
    """Whether it compiles for a chip that is not here, by the number of its model."""

    def takes(self, device_type: DeviceType) -> bool:
        """Whether `auto` or one of its devices is asked for."""
        return device_type in ("auto", *self.device_types)

    def device(self, device_type: DeviceType) -> DeviceType:
        """The device that is meant."""
        return self.device_types[0] if device_type == "auto" else device_type


_INTEL: tuple[DeviceType, ...] = ("CPU", "GPU", "NPU")
ACCELERATING: dict[str, Accelerating] = {
    "qnn": Accelerating(("auto", "whole"), ("auto", "int8"), alone=True, device_types=("NPU",), soc_model=True),
    "openvino": Accelerating(("whole",), ("auto",), alone=False, device_types=_INTEL, soc_model=False),
    "openvino-ep": Accelerating(("auto", "whole"), ("auto",), alone=True, device_types=_INTEL, soc_model=False),
}
"""The runtimes with an accelerator, by name."""


@dataclass(frozen=True)
class WholePlan:
    """The step as one graph, with all activations in memory."""

    precision: Precision = "fp32"
    """Of products with frozen weights; `int8` has the graph whose weights are int8."""
    accelerator: Accelerator | None = None
    """What executes it, one graph for each shape; none on a runtime that takes any shape."""
    forward_only: bool = False
    """Run forward alone, and keep nothing for a backward pass."""
    sharding: Sharding = "auto"
    """What several processes divide between them, on a runtime that has several."""

    @property
    def kept_text(self) -> str:
        """What of the lowest layers' work is kept on disk: nothing."""
        return ""

    @property
    def trunk_layers(self) -> int:
        """Lowest layers that are left to a trunk: none."""
        return 0

    @property
    def moment_bytes(self) -> float:
        """Bytes of a number of an optimizer's moment."""
        return _FLOAT_BYTES

    def trained_slots(self, lora: Lora) -> Lora:
        """Those of a bundle's slots that steps change: all."""
        return lora

    def __str__(self) -> str:
        """In a few words."""
        whole = "whole forward pass" if self.forward_only else "whole step"
        weights = ", int8 weights" if self.precision == "int8" else ""
        if self.sharding != "auto":
            return f"{whole}, {self.sharding}"
        return whole if self.accelerator is None else f"{whole} in static shapes{weights}"


@dataclass(frozen=True)
class TrunkUse:
    """What a split bundle's trunk does in a run."""

    layers: int
    """The lowest ones, which it computes and which are not trained."""
    vitisai_config: Path | None = None
    """`vaip_config.json` of the Vitis AI that runs it."""


@dataclass(frozen=True)
class KeptStates:
    """What enters the lowest trained layer is the same in every epoch: how much of it is kept on disk.

    In any case it is rounded to 16 bits, so that nothing depends on what is kept.
    """

    most_bytes: int
    """At most; may be 0."""
    all_bytes: int
    """Of all rows that come more than once."""
    rows: int
    """Rows of the run, each counted once."""
    folder: Path | None = None
    """Where; without it a file that goes with the process."""
    spare_bytes: int = 0
    """Room on the disk that is left to others."""

    @property
    def share(self) -> float:
        """Of the rows that come more than once: how many fit, about."""
        return min(1.0, self.most_bytes / max(1, self.all_bytes))


@dataclass(frozen=True)
class LayeredPlan:
    """The step sublayer by sublayer. Every plan gives the same gradients, but for its precision."""

    precision: Precision = "fp32"
    """Of products with frozen weights; `int8` quantises activations and gradients as well."""
    exact_layers: int = 0
    """Lowest layers whose forward products stay exact where the others' are int8."""
    kept_layers: int = 0
    """Layers whose activations are kept for the backward pass (the last ones); the others are computed again."""
    resident: bool = True
    """Keep all dequantised weights in memory; otherwise each is dequantised where it is used."""
    wide: bool = False
    """Compute sublayers in the larger of the two sizes of pieces for which the bundle has graphs."""
    lean: bool = False
    """Of layers that are computed again keep only what enters them, in 16 bits, and compute their attention twice;
    otherwise what enters either sublayer is kept as it is."""
    head_rows: int = 256
    """Trained rows whose logits exist at the same time."""
    head_tokens: int | None = None
    """Tokens of the vocabulary whose logits exist at the same time; all when it is not given."""
    trunk: TrunkUse | None = None
    """What computes the lowest layers; none where the plan runs them itself."""
    layers: Sequence[int] | None = None
    """The decoder layers that are trained, in their order; without it all that are above the trunk."""
    eight_bit_states: bool = False
    """Keep AdamW's moments in 8 bits between steps."""
    forward_only: bool = False
    """Run forward alone, and keep nothing for a backward pass."""
    states: KeptStates | None = None
    """What is kept of what enters the lowest trained layer; none where it is computed in every pass, as it is."""

    @property
    def trunk_layers(self) -> int:
        """Lowest layers that are left to the trunk."""
        return 0 if self.trunk is None else self.trunk.layers

    @property
    def kept_text(self) -> str:
        """What of the lowest layers' work is kept on disk, in a few words; empty where nothing is."""
        if self.states is None or not self.states.most_bytes:
            return ""
        share = "" if self.states.share == 1 else f" for {self.states.share:.0%} of the rows"
        return f"what enters layer {self.first_trained} kept on disk{share} ({bytes_text(self.states.most_bytes)})"

    @property
    def first_trained(self) -> int:
        """The lowest layer that is trained: those below have no backward pass."""
        return self.trunk_layers if self.layers is None else self.layers[0]

    @property
    def moment_bytes(self) -> float:
        """Bytes of a number of an optimizer's moment."""
        return BYTES_A_NUMBER if self.eight_bit_states else _FLOAT_BYTES

    def trained_slots(self, lora: Lora) -> Lora:
        """Those of a bundle's slots that steps change."""
        return lora.from_layer(self.trunk_layers) if self.layers is None else lora.of_layers(self.layers)

    def __str__(self) -> str:
        """In a few words."""
        kept = f"activations of {self.kept_layers} layers kept" if self.kept_layers else "activations computed again"
        kept = "forward only" if self.forward_only else kept
        weights = f"weights {'resident' if self.resident else 'streamed'}"
        trunk = [] if self.trunk is None else [f"split, {self.trunk.layers} layers in the trunk"]
        precision = f"{self.precision} above layer {self.exact_layers}" if self.exact_layers else self.precision
        words = {"lean": self.lean, "wide pieces": self.wide, "8-bit optimizer states": self.eight_bit_states}
        further = [word for word, given in words.items() if given]
        span = self.layers
        trained = [] if span is None else [f"{layers_text(span)} trained"]
        return ", ".join([*trunk, *trained, precision, kept, weights, *further])


ExecutionPlan = WholePlan | LayeredPlan
"""One way to execute a step."""
