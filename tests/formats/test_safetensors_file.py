"""Safetensors files of others: read, explained when they are broken, and looked through for NaN and infinity."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from edgetune.errors import VerificationError
from edgetune.formats import safetensors_file
from edgetune.formats.safetensors_file import (
    FLOATS,
    StoredTensor,
    as_float32,
    from_float32,
    non_finite,
    read_header,
)
from support.small_checkpoint import POINTER


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "a.safetensors"


def torch_types() -> dict[str, Any]:
    import torch

    return {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}


def wrong_in(path: Path) -> list[str]:
    return list(non_finite(path, read_header(path).items()))


def test_the_header_is_that_of_safetensors(path: Path) -> None:
    from safetensors.numpy import save_file

    values = {"a": np.ones((2, 3), np.float32), "b": np.zeros((0, 4), np.float16), "c": np.ones((), np.int64)}
    save_file(values, path, metadata={"format": "pt"})
    data, header = path.read_bytes(), read_header(path)
    assert {name: (tensor.dtype, tensor.shape) for name, tensor in header.items()} == {
        "a": ("F32", (2, 3)), "b": ("F16", (0, 4)), "c": ("I64", ()),
    }  # fmt: skip
    for name, tensor in header.items():
        assert data[tensor.start : tensor.end] == values[name].tobytes()


def test_a_file_cut_off_anywhere_is_called_that(path: Path) -> None:
    from safetensors.numpy import save_file

    save_file({"a": np.ones(3, np.float32), "b": np.ones(2, np.float32)}, path)
    whole = path.read_bytes()
    for cut in range(len(whole)):
        path.write_bytes(whole[:cut])
        with pytest.raises(VerificationError, match=f"{path}: is cut off: it has {cut} .*; copy or download it again"):
            read_header(path)
    path.write_bytes(whole)
    read_header(path)


@pytest.mark.parametrize(
    "data",
    [
        b"<!DOCTYPE html><html>", b"\xff" * 64, b"PK\x03\x04" + bytes(60), bytes(64), b"\x02" + bytes(7) + b"[]",
        b"\x02" + bytes(7) + b"{}" + b"more",
    ],
)  # fmt: skip
def test_what_is_something_else_is_not_called_cut_off(path: Path, data: bytes) -> None:
    path.write_bytes(data)
    with pytest.raises(VerificationError, match=f"{path}: not a valid safetensors file .*; copy or download it again"):
        read_header(path)


def test_a_header_that_contradicts_itself_is_refused(path: Path) -> None:
    for offsets in ([0, 4], [4, 8], [8, 0], [0, "8"], [0], None):
        header = json.dumps({"a": {"dtype": "F32", "shape": [2], "data_offsets": offsets}}).encode()
        path.write_bytes(len(header).to_bytes(8, "little") + header + bytes(8))
        with pytest.raises(VerificationError, match="not a valid safetensors file"):
            read_header(path)


def test_a_pointer_and_a_missing_file(path: Path) -> None:
    with pytest.raises(VerificationError, match=f"{path}: .*No such file"):
        read_header(path)
    path.write_bytes(POINTER)
    with pytest.raises(VerificationError, match=f"{path}: a Git LFS pointer .*\n.*run `git lfs pull`"):
        read_header(path)


@pytest.mark.parametrize("dtype", FLOATS)
def test_nan_and_infinity_are_found_in_every_type(path: Path, dtype: str) -> None:
    import torch
    from safetensors.torch import save_file

    kind = torch_types()[dtype]
    ends = torch.finfo(kind)
    good = torch.tensor([0.0, -0.0, ends.max, ends.min, ends.tiny, ends.smallest_normal / 4], dtype=kind)
    wrong = {str(value): torch.tensor([1.0, value, 2.0], dtype=kind) for value in (np.nan, np.inf, -np.inf)}
    save_file({"good": good, "none": torch.zeros(0, dtype=kind), **wrong}, path)
    assert sorted(wrong_in(path)) == sorted(wrong)


@pytest.mark.parametrize("dtype", FLOATS)
def test_every_place_is_looked_at(path: Path, monkeypatch: pytest.MonkeyPatch, dtype: str) -> None:
    import torch
    from safetensors.torch import save_file

    monkeypatch.setattr(safetensors_file, "_CHUNK", 16)
    for place in range(37):
        values = torch.ones(37, dtype=torch_types()[dtype])
        values[place] = torch.nan
        save_file({"before": torch.ones(3), "wrong": values, "zafter": torch.ones(5)}, path)
        assert wrong_in(path) == ["wrong"]


def test_bit_patterns_against_numpy(path: Path) -> None:
    """All 65,536 numbers of sixteen bits, one by one."""
    every = np.arange(65536, dtype="<u2")
    path.write_bytes(every.tobytes())
    one = {index: StoredTensor("F16", (1,), 2 * index, 2 * index + 2) for index in range(65536)}
    found = {int(name) for name in non_finite(path, ((str(index), tensor) for index, tensor in one.items()))}
    assert found == set(np.flatnonzero(~np.isfinite(every.view("<f2"))).tolist())


@pytest.mark.parametrize("dtype", FLOATS)
def test_numbers_are_rounded_and_read_as_pytorch_does(dtype: str) -> None:
    import torch

    draws = np.random.default_rng(0).standard_normal(4096).astype(np.float32)
    halfway = np.array([1 + 2**-8, 1 + 3 * 2**-8, 1 + 2**-11, 1 + 3 * 2**-11, -1 - 2**-8], np.float32)
    extremes = np.array([0.0, -0.0, 1e-45, 6e-8, 65504, 65520, 1e30, 3.4e38, -3.4e38], np.float32)
    values = np.concatenate([draws, halfway, extremes])
    expected = torch.from_numpy(values).to(torch_types()[dtype])
    stored = from_float32(values, dtype)
    assert stored == expected.contiguous().view(torch.uint8).numpy().tobytes()
    np.testing.assert_array_equal(as_float32(stored, dtype), expected.float().numpy())
