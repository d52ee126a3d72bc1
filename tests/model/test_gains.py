"""DoRA's norms, found from P = W·Aᵀ, are those of the rows of W + s·B·A."""

from __future__ import annotations

import numpy as np
import pytest

from edgetune.model.gains import gains_of, row_norms

OUT, IN, RANK, SCALING = 24, 40, 4, 1.5


@pytest.mark.parametrize("spread", [0.0, 0.1, 3.0])
def test_norms_are_those_of_the_sum(spread: float) -> None:
    generator = np.random.default_rng(0)
    weight, a, b = (
        generator.standard_normal(shape).astype(np.float32) for shape in ((OUT, IN), (RANK, IN), (OUT, RANK))
    )
    b *= np.float32(spread)
    found = row_norms(np.linalg.norm(weight, axis=1), a @ weight.T, a, b, SCALING)
    assert found.dtype == np.float32
    np.testing.assert_allclose(found, np.linalg.norm(weight + SCALING * b @ a, axis=1), rtol=1e-5)


def test_a_row_of_zeros_has_no_gain_and_no_nan() -> None:
    zeros = np.zeros((OUT, RANK), np.float32)
    norms = row_norms(np.zeros(OUT, np.float32), zeros.T, np.ones((RANK, IN), np.float32), zeros, SCALING)
    np.testing.assert_array_equal(gains_of(np.zeros(OUT, np.float32), norms), 0)
