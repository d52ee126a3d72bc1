"""The dynamic tree code of optimizer states, against its bytes as the paper has them and a search in float64."""

from __future__ import annotations

import numpy as np
import pytest
from numpy.typing import NDArray

from edgetune.model.dynamic_code import BLOCK, BYTES_A_NUMBER, BlockCode, code_values

Array = NDArray[np.float32]
SMALLEST = np.finfo(np.float32).tiny
each_code = pytest.mark.parametrize("signed", [True, False], ids=["signed", "unsigned"])


def value_of_byte(byte: int, signed: bool) -> float:
    """By Dettmers et al. 2022, section 1.2 and appendix: sign, zeros that count tens, a one, a linear fraction.

    Without a sign, its bit is one more of the fraction.
    """
    bits = f"{byte:08b}"
    sign, tree = (-1.0 if bits[0] == "1" else 1.0, bits[1:]) if signed else (1.0, bits[:7])
    further = "" if signed else bits[7]
    if "1" not in tree:
        return 1.0 if bits[0 if signed else 7] == "1" else 0.0
    zeros = tree.index("1")
    fraction = tree[zeros + 1 :] + further
    count = 2 ** len(fraction)
    step = int(fraction, 2) if fraction else 0
    return float(sign * 10.0**-zeros * (0.1 + 0.9 * (step + 0.5) / count))


@each_code
def test_the_values_are_those_of_the_256_bytes(signed: bool) -> None:
    expected = sorted(value_of_byte(byte, signed) for byte in range(256))
    found = code_values(signed=signed)
    assert found.dtype == np.float32 and len(set(found.tolist())) == 256
    np.testing.assert_allclose(found, expected, rtol=3e-7, atol=0)


def test_the_ends_are_those_that_bitsandbytes_has() -> None:
    """`create_dynamic_map` of 0.50.2, of which no value is further off than a rounding."""
    signed, unsigned = code_values(signed=True), code_values(signed=False)
    np.testing.assert_allclose(signed[:2], [-0.9929688, -0.9789063], rtol=1e-6)
    np.testing.assert_allclose(signed[126:130], [-5.5e-7, 0, 5.5e-7, 3.25e-6], rtol=1e-6)
    np.testing.assert_allclose(signed[-2:], [0.9929688, 1], rtol=1e-6)
    np.testing.assert_allclose(unsigned[:4], [0, 3.25e-7, 7.75e-7, 2.125e-6], rtol=1e-6)
    np.testing.assert_allclose(unsigned[-2:], [0.9964844, 1], rtol=1e-6)


def nearest(shares: NDArray[np.float64], values: Array) -> NDArray[np.float64]:
    """How far the nearest value is, in float64: the one above or the one below."""
    exact = values.astype(np.float64)
    above = np.searchsorted(exact, shares).clip(0, 255)
    return np.minimum(np.abs(exact[above] - shares), np.abs(exact[(above - 1).clip(0)] - shares))


def numbers_of(signed: bool) -> Array:
    """Blocks of many sizes and spreads; zeros, whole blocks of zeros, the smallest numbers, and one large number."""
    generator = np.random.default_rng(0)
    blocks = generator.standard_normal((600, BLOCK)) * 10.0 ** generator.uniform(-30, 30, (600, 1))
    blocks[100:300] *= 10.0 ** generator.uniform(-9, 0, (200, BLOCK))
    blocks[5, ::3] = blocks[6] = 0
    blocks[7] = np.where(np.arange(BLOCK) == 9, 1e-42, 0)
    blocks[8, 17] *= 1e6
    found = blocks.astype(np.float32).reshape(-1)
    return found if signed else np.square(found / np.float32(1e12))


def rounded(code: BlockCode, numbers: Array) -> Array:
    codes, scales = np.empty(numbers.size, np.uint8), np.empty(numbers.size // BLOCK, np.float32)
    code.quantise(numbers, codes, scales)
    found = np.full(numbers.size, np.nan, np.float32)
    code.dequantise(codes, scales, found)
    return found


@each_code
def test_each_number_is_rounded_to_the_nearest_value(signed: bool) -> None:
    code, numbers = BlockCode(signed=signed), numbers_of(signed)
    codes, scales = np.empty(numbers.size, np.uint8), np.empty(numbers.size // BLOCK, np.float32)
    code.quantise(numbers, codes, scales)
    blocks = numbers.reshape(-1, BLOCK)
    largest = np.abs(blocks).max(axis=1)
    np.testing.assert_array_equal(scales, np.where(largest < SMALLEST, 0, largest))
    shares = (blocks / np.maximum(scales, SMALLEST)[:, None]).reshape(-1).astype(np.float64)
    found, distance = code.values[codes].astype(np.float64), nearest(shares, code.values)
    rounded_up = (not signed) & (shares > 0) & (shares < code.values[1])
    assert rounded_up.any() != signed
    np.testing.assert_array_equal(np.abs(found - shares)[~rounded_up], distance[~rounded_up])
    assert (found[rounded_up] == code.values[1]).all(), "what is divided by is not rounded to nothing"


@each_code
def test_every_upper_half_of_a_float_is_looked_up_right(signed: bool) -> None:
    """At both ends of all numbers that share their upper 16 bits, and right beside the middle of two values."""
    code = BlockCode(signed=signed)
    upper = np.arange(1 << 16, dtype=np.uint32) << 16
    middles = ((code.values[1:].astype(np.float64) + code.values[:-1]) / 2).astype(np.float32)
    beside = [np.nextafter(middles, np.float32(side)) for side in (-2, 2)]
    numbers = np.concatenate([upper.view(np.float32), (upper | 0xFFFF).view(np.float32), middles, *beside])
    with np.errstate(invalid="ignore"):
        numbers = numbers[(np.abs(numbers) <= 1) & (signed | (numbers >= 0))]
    # The largest is 1 in every block, so that a number is its own share.
    blocks = np.ones((-(-numbers.size // (BLOCK - 1)), BLOCK), np.float32)
    flat = np.zeros(blocks[:, 1:].size, np.float32)
    flat[: numbers.size] = numbers
    blocks[:, 1:] = flat.reshape(-1, BLOCK - 1)
    found = rounded(code, blocks.reshape(-1)).reshape(blocks.shape)[:, 1:].reshape(-1)[: numbers.size]
    shares = numbers.astype(np.float64)
    told = np.ones(numbers.size, bool) if signed else (numbers == 0) | (numbers >= code.values[1])
    np.testing.assert_array_equal(np.abs(found - shares)[told], nearest(shares, code.values)[told])
    assert (found[~told] == code.values[1]).all()


@each_code
def test_no_number_is_further_off_than_half_an_interval(signed: bool) -> None:
    """Of its own decade below the block's largest magnitude; what is below all decades, than the smallest value."""
    code, numbers = BlockCode(signed=signed), numbers_of(signed)
    normal = np.abs(numbers.reshape(-1, BLOCK)).max(axis=1) > 1e-30
    blocks = numbers.reshape(-1, BLOCK)[normal].astype(np.float64)
    found = rounded(code, numbers).reshape(-1, BLOCK)[normal].astype(np.float64)
    largest = np.abs(blocks).max(axis=1, keepdims=True)
    shares, errors = np.abs(blocks) / largest, np.abs(found - blocks) / largest
    decade = np.ceil(-np.log10(np.maximum(shares, 1e-7))) - 1
    intervals = 2 ** (6 - decade + (not signed))
    bound = np.where(shares > 1e-7, 0.9 * 10.0**-decade / intervals / 2, 3.25e-7)
    assert (errors <= bound * (1 + 1e-6)).all()
    # It is no looser than it has to be.
    assert errors.max() == pytest.approx(0.45 / (64 if signed else 128), rel=1e-2)


def test_blocks_know_nothing_of_each_other() -> None:
    code, numbers = BlockCode(signed=True), numbers_of(True)
    alone = np.concatenate([rounded(code, block) for block in numbers.reshape(-1, BLOCK)])
    np.testing.assert_array_equal(rounded(code, numbers), alone)


@each_code
def test_what_was_rounded_stays(signed: bool) -> None:
    """A block whose largest magnitude is a value of the code does not change when it is rounded again."""
    code = BlockCode(signed=signed)
    block = code.values * np.float32(0.37)
    np.testing.assert_array_equal(rounded(code, block), block)


def test_bytes_of_a_number() -> None:
    codes, scales = np.empty(BLOCK, np.uint8), np.empty(1, np.float32)
    assert (codes.nbytes + scales.nbytes) / BLOCK == BYTES_A_NUMBER
