"""The rotation of int8 rows: exact algebra, and what it leaves of a row with an enormous number, in float64."""

from __future__ import annotations

import numpy as np
import pytest
from numpy.typing import NDArray

from edgetune.model.rotation import rotated_weight, signs_of


@pytest.mark.parametrize(
    ("width", "size"), [(1, 1), (6, 2), (72, 8), (96, 32), (192, 64), (576, 64), (1536, 64), (3072, 64), (8192, 64)]
)
def test_signs_are_a_symmetric_hadamard_matrix(width: int, size: int) -> None:
    signs = signs_of(width)
    assert signs.shape == (size, size)
    assert set(np.unique(signs)) <= {-1, 1}
    np.testing.assert_array_equal(signs, signs.T)
    np.testing.assert_array_equal(signs @ signs, size * np.eye(size))


@pytest.mark.parametrize("width", [96, 192])
def test_products_stay_what_they_are(width: int) -> None:
    generator = np.random.default_rng(0)
    weight, x, dy = (generator.standard_normal(shape) for shape in ((80, width), (5, width), (5, 80)))
    turned = rotated_weight(weight)
    assert turned.dtype == np.float32
    np.testing.assert_allclose(with_signs(x) @ turned.T, x @ weight.T, rtol=0, atol=1e-4)
    np.testing.assert_allclose(with_signs(dy @ turned), dy @ weight, rtol=0, atol=1e-4)


def test_an_enormous_number_leaves_the_others() -> None:
    """Of 576 normal numbers one is 100: rounded by the largest, the others are lost, and rotated they are not."""
    generator = np.random.default_rng(1)
    x = generator.standard_normal((200, 576))
    x[:, 40] = 100
    others = np.arange(576) != 40
    errors = [(found - x)[:, others].std() for found in (rounded(x), with_signs(rounded(with_signs(x))) / 64)]
    assert errors[0] > 0.2
    assert errors[1] < 0.04


def with_signs(x: NDArray[np.floating]) -> NDArray[np.float64]:
    signs = signs_of(x.shape[1]).astype(np.float64)
    return (x.reshape(-1, len(signs)) @ signs).reshape(x.shape)


def rounded(x: NDArray[np.floating]) -> NDArray[np.float64]:
    """To 127 steps of each row's largest number."""
    steps = np.abs(x).max(axis=1, keepdims=True) / 127
    return np.rint(x / steps) * steps
