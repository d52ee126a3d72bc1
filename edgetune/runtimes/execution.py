"""How a training step is executed: what is kept in memory, what is computed again, and in which precision."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from edgetune.config import DeviceType, PlanName, TrainConfig

Products = Literal["fp32", "bf16", "int8"]


@dataclass(frozen=True)
class Accelerator:
    """What executes a whole step whose shapes are static."""

    device_type: DeviceType = TrainConfig.device_type
    """Which of a runtime's devices."""
    soc_model: int | None = TrainConfig.soc_model
    """Qualcomm's number of the chip that is compiled for where no NPU is found; the runtime's choice without it."""
    require: bool = TrainConfig.require_npu
    """Refuse a graph of which a node falls back to the CPU."""


@dataclass(frozen=True)
class Accelerating:
    """What a runtime with an accelerator takes, whether it is installed or not."""

    plans: tuple[PlanName, ...]
    """With which it compiles the whole step for static shapes."""
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
    "qnn": Accelerating(plans=("auto", "whole", "int8"), alone=True, device_types=("NPU",), soc_model=True),
    "openvino": Accelerating(plans=("whole",), alone=False, device_types=_INTEL, soc_model=False),
    "openvino-ep": Accelerating(plans=("auto", "whole"), alone=True, device_types=_INTEL, soc_model=False),
}
"""The runtimes with an accelerator, by name."""


@dataclass(frozen=True)
class ExecutionPlan:
    """One way to execute the same step. Every plan gives the same gradients, but for the precision of its products."""

    form: Literal["whole", "layered"]
    """`whole`: one graph, all activations in memory. `layered`: sublayer by sublayer."""
    products: Products = "fp32"
    """Precision of products with frozen weights; `int8` quantises activations and gradients as well."""
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
    accelerator: Accelerator | None = None
    """Of a whole step whose shapes are static; none on a runtime that takes any shape."""
    trunk_layers: int = 0
    """Lowest layers that are left to the bundle's trunk and not trained."""
    trunk_cache_bytes: int = 0
    """How much to keep of what the trunk computed."""
    vitisai_config: Path | None = None
    """`vaip_config.json` of the Vitis AI that runs the trunk."""
    forward_only: bool = False
    """Run forward alone, and keep nothing for a backward pass."""

    def __str__(self) -> str:
        """In a few words."""
        if self.form == "whole":
            whole = "whole forward pass" if self.forward_only else "whole step"
            weights = ", int8 weights" if self.products == "int8" else ""
            return whole if self.accelerator is None else f"{whole} in static shapes{weights}"
        kept = f"activations of {self.kept_layers} layers kept" if self.kept_layers else "activations computed again"
        kept = "forward only" if self.forward_only else kept
        weights = f"weights {'resident' if self.resident else 'streamed'}"
        trunk = [f"split, {self.trunk_layers} layers in the trunk"] if self.trunk_layers else []
        products = f"{self.products} above layer {self.exact_layers}" if self.exact_layers else self.products
        further = [word for word, given in (("lean", self.lean), ("wide pieces", self.wide)) if given]
        return ", ".join([*trunk, products, kept, weights, *further])


WHOLE_STEP = ExecutionPlan("whole")
"""The step as one graph."""
LAYERED = ExecutionPlan("layered")
"""Layer by layer, and nothing said of how."""
