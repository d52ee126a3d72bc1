"""What a bundle's layered graphs say of themselves: into how many pieces sublayers were cut, and what pieces keep."""

from __future__ import annotations

import math

from edgetune.errors import VerificationError
from edgetune.formats.manifest import BundleManifest, TensorSpec
from edgetune.formats.roles import LAYERS, WIDE, sublayer_role
from edgetune.model.pieces import Pieces


def widths(manifest: BundleManifest) -> tuple[bool, ...]:
    """Which pieces a bundle has graphs for: wide ones where those differ from the others."""
    wide = any(graph.role.startswith(f"{LAYERS}/{WIDE}/") for graph in manifest.graphs)
    return (False, True) if wide else (False,)


def pieces_of(manifest: BundleManifest, *, wide: bool = False) -> Pieces:
    """How the graphs of a bundle were cut.

    Raises:
        VerificationError: The manifest does not say, or says what cannot be.
    """
    a = manifest.architecture
    attention, mlp = (sublayer_role(LAYERS, name, wide=wide) for name in ("attention", "mlp"))
    found = Pieces(
        _count(manifest, attention, "q_proj.weight", a.num_attention_heads * a.head_dim, a.num_key_value_heads),
        _count(manifest, mlp, "gate_proj.weight", a.intermediate_size, a.intermediate_size),
    )
    others = pieces_of(manifest) if wide else found
    if others.attention % found.attention or others.mlp % found.mlp:
        raise VerificationError(
            f"the bundle's manifest: {found.attention} and {found.mlp} wide pieces, expected each to be several of the "
            f"{others.attention} and {others.mlp} others; make the bundle anew"
        )
    return found


def _count(manifest: BundleManifest, role: str, name: str, rows: int, units: int) -> int:
    """Into how many pieces a weight's rows were cut, each of which has as many of the units that stay together."""
    shapes = [spec.shape for spec in manifest.graph(role).inputs if spec.name == name]
    size = shapes[0][0] if len(shapes) == 1 and shapes[0] else None
    if not isinstance(size, int) or size < 1 or rows % size or units % (rows // size):
        raise VerificationError(
            f"the bundle's manifest: {role} takes {name} of shape {shapes!s:.60}, expected one matrix with "
            f"an equal part of the {rows} rows; make the bundle anew"
        )
    return rows // size


def kept_outputs(manifest: BundleManifest, role: str) -> list[TensorSpec]:
    """What a sublayer's graph gives beside its output, for the backward pass.

    Raises:
        VerificationError: The manifest does not say, or says what cannot be.
    """
    kept = [spec for spec in manifest.graph(role).outputs if spec.name != "output"]
    a = manifest.architecture
    widest = max(a.hidden_size, a.num_attention_heads * a.head_dim, a.intermediate_size)
    for spec in kept:
        sizes = [size for size in spec.shape if isinstance(size, int)]
        names = [size for size in spec.shape if not isinstance(size, int)]
        if names != ["batch", "sequence"] or not 1 <= math.prod(sizes) <= widest:
            raise VerificationError(
                f"the bundle's manifest: {role} gives {spec.name:.40} of shape {spec.shape!s:.60}, expected batch, "
                f"sequence and at most {widest} channels; make the bundle anew"
            )
    return kept
