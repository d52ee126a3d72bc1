"""How a bundle says that its sublayers were cut; what they compute is in runtimes/test_layered.py."""

from __future__ import annotations

from dataclasses import replace

import pytest

from edgetune.errors import VerificationError
from edgetune.formats.bundle import Bundle, load_bundle
from edgetune.formats.layered_graphs import kept_outputs, pieces_of, widths
from edgetune.formats.manifest import BundleManifest, TensorSpec
from edgetune.formats.roles import sublayer_role
from edgetune.model.lora import initial_parameters
from edgetune.model.pieces import Pieces, cut
from edgetune.runtimes import onnxruntime as stock
from edgetune.runtimes.contract import OptimizerConfig
from edgetune.runtimes.execution import LayeredPlan
from support.golden import BUNDLE

Shape = list[int | str]


@pytest.fixture(scope="module")
def golden() -> Bundle:
    return load_bundle(BUNDLE)


def with_specs(
    manifest: BundleManifest, role: str, inputs: list[TensorSpec] | None = None, outputs: list[TensorSpec] | None = None
) -> BundleManifest:
    """A manifest that says other inputs or outputs of a graph."""
    changed = [
        replace(g, inputs=g.inputs if inputs is None else inputs, outputs=g.outputs if outputs is None else outputs)
        if g.role == role
        else g
        for g in manifest.graphs
    ]
    return replace(manifest, graphs=changed)


def weight(name: str, shape: Shape) -> list[TensorSpec]:
    return [TensorSpec(name, "float", shape)]


def test_the_golden_bundle_is_one_piece(golden: Bundle) -> None:
    assert pieces_of(golden.manifest) == cut(golden.manifest.architecture) == Pieces(1, 1)


def test_pieces_are_equal_parts_of_the_rows(golden: Bundle) -> None:
    halves = with_specs(golden.manifest, "layers/attention", weight("q_proj.weight", [32, 64]))
    assert pieces_of(with_specs(halves, "layers/mlp", weight("gate_proj.weight", [32, 64]))) == Pieces(2, 4)


@pytest.mark.parametrize("shape", [[], [0, 64], ["out", 64], [63, 64], [128, 64], [2**62, 64], [16, 64]])
def test_rows_that_are_no_part_are_refused(golden: Bundle, shape: Shape) -> None:
    """Of 64 query rows, and of two groups of heads, which stay together."""
    manifest = with_specs(golden.manifest, "layers/attention", weight("q_proj.weight", shape))
    with pytest.raises(VerificationError, match=r"layers/attention takes q_proj.weight of shape .* the 64 rows; make"):
        pieces_of(manifest)


def test_wide_pieces_are_several_of_the_others(golden: Bundle) -> None:
    """Channels are left in the order of the others."""
    whole = golden.manifest
    roles = {name: sublayer_role("layers", name, wide=True) for name in ("attention", "mlp")}
    wide = [replace(whole.graph(f"layers/{name}"), role=role) for name, role in roles.items()]
    manifest = replace(whole, graphs=[*whole.graphs, *wide])
    assert widths(whole) == (False,)
    assert widths(manifest) == (False, True)
    assert pieces_of(manifest, wide=True) == Pieces(1, 1)
    halves = with_specs(manifest, roles["mlp"], weight("gate_proj.weight", [64, 64]))
    with pytest.raises(VerificationError, match=r"1 and 2 wide pieces, expected each to be several of the 1 and 1"):
        pieces_of(halves, wide=True)


@pytest.mark.parametrize("name", ["layers/attention", "layers/mlp"])
def test_a_graph_without_its_weights_is_refused(golden: Bundle, name: str) -> None:
    manifest = with_specs(golden.manifest, name, [])
    with pytest.raises(VerificationError, match=rf"{name} takes .*_proj.weight of shape \[\]"):
        pieces_of(manifest)


def test_what_is_kept_is_all_but_the_output(golden: Bundle) -> None:
    assert {spec.name for spec in kept_outputs(golden.manifest, "layers/mlp")} == {"gate", "up"}


@pytest.mark.parametrize(
    "shape",
    [
        [],
        [1],
        ["batch", 128],
        ["z", "sequence", 128],
        ["batch", "sequence", 129],
        ["batch", "sequence", 0],
        [2**62] * 20,
    ],
)
def test_sizes_that_nobody_keeps_are_refused(golden: Bundle, shape: Shape) -> None:
    manifest = with_specs(golden.manifest, "layers/mlp", outputs=weight("gate", shape))
    with pytest.raises(VerificationError, match=r"layers/mlp gives gate of shape .* at most 128 channels; make"):
        kept_outputs(manifest, "layers/mlp")


def test_outputs_are_those_of_the_graph(golden: Bundle) -> None:
    manifest = with_specs(golden.manifest, "layers/mlp", outputs=[])
    parameters = initial_parameters(manifest.lora, 0)
    plan = LayeredPlan(kept_layers=0, resident=False, head_rows=16)
    with (
        pytest.raises(VerificationError, match=r"mlp\.onnx gives output, .* and the bundle's manifest names others"),
        stock.open_session(replace(golden, manifest=manifest), parameters, OptimizerConfig(0.0, 1.0), plan),
    ):
        pass
