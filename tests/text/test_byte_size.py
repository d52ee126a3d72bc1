"""Sizes as people write them."""

from __future__ import annotations

import pytest

from edgetune.errors import UsageError
from edgetune.text.byte_size import parse_bytes


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("3GB", 3 * 10**9),
        ("2.5 gb", 2_500_000_000),
        ("800MB", 8 * 10**8),
        ("1GiB", 2**30),
        ("512MiB", 2**29),
        ("4096B", 4096),
        ("1.5kB", 1500),
        (" 2KiB ", 2048),
        ("1.001kB", 1001),
        ("16.1kB", 16_100),
        ("4.35MB", 4_350_000),
        ("9007199254740993B", 2**53 + 1),
    ],
)
def test_sizes(text: str, size: int) -> None:
    assert parse_bytes(text) == size


@pytest.mark.parametrize(
    "text",
    ["", "3", "GB", "-1GB", "1e9B", "3 GBs", "3G", "nan GB", "3,5GB", "²GB", "3GB 4GB", "9" * 400 + "GB"],
    ids=lambda text: text[:9],
)
def test_what_is_no_size(text: str) -> None:
    with pytest.raises(UsageError, match=r"is no size; expected a number and one of B, kB, MB, .* such as 3GB"):
        parse_bytes(text)


@pytest.mark.parametrize("text", ["0GB", "0.1B"])
def test_nothing_is_no_budget(text: str) -> None:
    with pytest.raises(UsageError, match="no memory at all"):
        parse_bytes(text)
