"""Roles that a bundle's graphs play, and what their names are made of."""

from __future__ import annotations

from edgetune.formats.manifest import BundleManifest

STEP, LOSS = "step", "loss"
"""Roles of the whole step: loss and gradients, and the loss alone."""
HALF_STEP, HALF_LOSS = "step_half", "loss_half"
"""Roles of the same graphs with norms that float16 holds."""
INT8_STEP, INT8_LOSS = "step_int8", "loss_int8"
"""Roles of the graphs whose frozen weights are int8, for NPUs."""
LAYERS = "layers"
"""Folder of a bundle with the graphs of the layered form."""
INDEX = f"{LAYERS}/weights.json"
INT8 = "int8"
"""Folder in it with the graphs whose products with frozen weights are int8."""
FORWARD, BACKWARD, SCALES = "forward", "backward", ".scales"
"""The int8 graphs take `W.forward` and `W.backward`, and `.scales` of each, instead of a weight `W`."""
WIDE = "wide"
"""Folder of the graphs for wide pieces, beside those for the others."""


def roles_in_half(manifest: BundleManifest) -> tuple[str, str]:
    """The whole step, and its loss alone, for what computes in float16.

    A bundle without graphs for it has norms that float16 holds in `step` and `loss`, or is older than these norms; one
    whose slots have magnitudes is not for what computes in float16.
    """
    has_own = any(graph.role == HALF_STEP for graph in manifest.graphs)
    return (HALF_STEP, HALF_LOSS) if has_own else (STEP, LOSS)


def sublayer_role(folder: str, name: str, *, wide: bool) -> str:
    """The graph of a sublayer, or of its wide pieces, among those of a folder: `layers`, or `layers/int8`."""
    return f"{folder}/{WIDE}/{name}" if wide else f"{folder}/{name}"
