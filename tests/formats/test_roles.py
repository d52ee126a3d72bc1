"""Roles of the graphs that a bundle has, and of those that older ones lack."""

from __future__ import annotations

from edgetune.formats.bundle import load_bundle
from edgetune.formats.roles import HALF_LOSS, HALF_STEP, roles_in_half
from support.golden import BUNDLE, EARLIER
from support.prepared_bundles import Prepared


def test_float16_has_graphs_of_its_own_where_the_bundle_has_them() -> None:
    assert roles_in_half(load_bundle(BUNDLE).manifest) == (HALF_STEP, HALF_LOSS)
    assert roles_in_half(load_bundle(EARLIER / "bundle").manifest) == ("step", "loss")


def test_a_bundle_with_magnitudes_has_none_for_float16(with_dora: Prepared) -> None:
    manifest = with_dora("grouped-query", "fp32").manifest
    assert roles_in_half(manifest) == ("step", "loss")
    assert {graph.role for graph in manifest.graphs if "/" not in graph.role} == {"step", "loss", "adamw", "model"}
