"""The gains of an adapter with magnitudes, for models that hold it: g = m / ‖W + s·B·A‖, by rows."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from edgetune.formats.bundle import Bundle
from edgetune.formats.frozen_weights import FrozenWeights
from edgetune.formats.row_norms import read_row_norms
from edgetune.model.gains import gains_of, row_norms
from edgetune.model.lora import Lora, Parameters, Slot


def adapter_gains(bundle: Bundle, parameters: Parameters) -> dict[str, NDArray[np.float32]]:
    """The gain (out_features,) of every slot, under the names of `Slot.gain`; none without DoRA.

    Args:
        bundle: Holds the weights under the adapter, and their row norms.
        parameters: The adapter, as `Lora.shapes` names it.

    Raises:
        VerificationError: The row norms are not those of the slots, or the weights' index is broken.
    """
    lora, norms = bundle.manifest.lora, read_row_norms(bundle)
    if not lora.dora:
        return {}
    frozen = FrozenWeights(bundle.path, bundle.manifest.architecture)
    found = {slot.gain: _gains(slot, lora, parameters, norms[slot.name], frozen) for slot in lora.slots}
    frozen.forget()
    return found


def _gains(
    slot: Slot, lora: Lora, parameters: Parameters, norms: NDArray[np.float32], frozen: FrozenWeights
) -> NDArray[np.float32]:
    a, b = parameters[slot.a], parameters[slot.b]
    projected = a @ frozen.whole(f"{slot.name}.weight").T
    return gains_of(parameters[slot.magnitude], row_norms(norms, projected, a, b, lora.scaling_of(slot.module)))
