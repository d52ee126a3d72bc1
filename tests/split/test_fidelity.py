"""What is said of the distance between the int8 trunk and the float one, and what is refused."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest

from edgetune.config import SplitConfig
from edgetune.errors import IncompatibleError
from edgetune.formats.frozen_weights import FrozenWeights
from edgetune.formats.trunk import read_trunk_info
from edgetune.runtimes.layered.lower_layers import QuantisedLayers, Trunk
from edgetune.split import split
from edgetune.split.fidelity import described, require_fidelity
from support.prepared_bundles import Prepared
from support.split_runs import FloatLayers, encoded_rows, write_split_rows
from support.tiny_step import batch_of


def test_the_error_is_the_distance_of_the_states(prepared: Prepared, tmp_path: Path) -> None:
    """Against the trunk as training runs it, beside the float layers."""
    whole, data, said = prepared("multi-head", "int4"), write_split_rows(tmp_path), []
    halves = split(whole, data, tmp_path / "split", SplitConfig(length=48), say=said.append)
    frozen = FrozenWeights(whole.path, whole.manifest.architecture)
    batch = batch_of(halves, encoded_rows(halves, data))
    both = (QuantisedLayers(halves), FloatLayers(whole, 1))
    found, exact = (Trunk(frozen, layers).hidden(batch) for layers in both)
    real = batch.rows >= 0
    expected = np.mean(np.linalg.norm((found - exact)[real], axis=-1) / np.linalg.norm(exact[real], axis=-1))
    (error,) = read_trunk_info(halves).errors
    assert error == pytest.approx(expected, rel=1e-3)
    assert 0.01 < error < 0.2
    assert f"In int8 the hidden states are {error:.1%} from float; layer 0 adds {error:.1%}" in said


def test_the_layers_that_suffer_are_named_the_worst_first() -> None:
    text = "In int8 the hidden states are 37.0% from float; layer 3 adds 20.0%; layer 1 adds 8.0%; layer 4 adds 6.0%"
    assert described([0.02, 0.1, 0.11, 0.31, 0.37]) == text
    assert described([0.01, 0.02]) == "In int8 the hidden states are 2.0% from float"


def test_a_trunk_that_is_too_far_off_is_refused(prepared: Prepared, tmp_path: Path) -> None:
    require_fidelity([0.1, 0.5], 0.5)
    for errors, text in (
        ([0.1, 0.6], "layer 1 adds 50.0%; layer 0 adds 10.0%; at most 50%"),
        ([0.1, math.nan], "layer 1 are not finite"),
    ):
        with pytest.raises(IncompatibleError, match=text):
            require_fidelity(errors, 0.5)
    data = write_split_rows(tmp_path)
    with pytest.raises(IncompatibleError, match="Use fewer --layers, or allow more with --largest-error"):
        split(prepared("multi-head", "int4"), data, tmp_path / "split", SplitConfig(length=48, largest_error=0.001))
    assert not (tmp_path / "split").exists()
