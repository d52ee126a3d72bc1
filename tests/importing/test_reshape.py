"""Updates in slots: what a bundle cannot hold comes with the bundle that can, and what is rounded is rounded once."""

from __future__ import annotations

import shlex
from fractions import Fraction
from pathlib import Path
from typing import Any

import click
import numpy as np
import pytest

from edgetune.cli import main
from edgetune.cli.prepare import command
from edgetune.config import PrepareConfig
from edgetune.errors import IncompatibleError
from edgetune.importing import read_foreign
from edgetune.importing.reshape import rescaled
from edgetune.model.architecture import slots_of
from edgetune.model.lora import Lora
from edgetune.preparation.slots import lora_of as prepared_lora
from support.foreign_adapters import ALL, APART, ARCHITECTURE, bundle_of, lora_of, peft_model, torch_model, write_peft

SMALL = Lora(8, 16.0, ["o_proj"], slots_of(ARCHITECTURE, ["o_proj"]))


def refusal(source: Path, lora: Lora, folder: Path) -> str:
    with pytest.raises(IncompatibleError) as caught:
        read_foreign(source, bundle_of(lora, folder))
    return str(caught.value)


@pytest.mark.parametrize(
    ("apart", "options", "reasons", "line"),
    [
        (
            False,
            {"r": 32, "lora_alpha": 16, "target_modules": ["o_proj"]},
            ["o_proj needs rank 32 in 2 layers; the bundle has 8"],
            "--rank 32 --alpha 16 --targets o_proj",
        ),
        (
            False,
            {"r": 4, "lora_alpha": 8, "target_modules": ALL},
            ["no slots for down_proj in 2 layers, gate_up_proj in 2 layers, qkv_proj in 2 layers; its slots are on"],
            "--rank 4 --alpha 8 --targets all-linear",
        ),
        (
            False,
            {"r": 16, "lora_alpha": 32, "use_rslora": True, "target_modules": ["o_proj"]},
            ["o_proj needs rank 16"],
            "--rank 16 --alpha 32 --rslora --targets o_proj",
        ),
        (
            False,
            {"r": 16, "lora_alpha": 8, "use_dora": True, "target_modules": ["o_proj"]},
            ["o_proj needs rank 16", "it is DoRA, with magnitudes"],
            "--rank 16 --alpha 8 --dora --targets o_proj",
        ),
        (
            True,
            {"r": 8, "lora_alpha": 8, "target_modules": APART},
            ["no slots for down_proj"],
            "--rank 8 --alpha 8 --rank-pattern qkv_proj=24 --rank-pattern gate_up_proj=16 --alpha-pattern qkv_proj=24 "
            "--alpha-pattern gate_up_proj=16 --targets all-linear",
        ),
        (
            False,
            {"r": 12, "lora_alpha": 6, "rank_pattern": {"layers.1.self_attn.o_proj": 20}, "target_modules": ["o_proj"],
             "alpha_pattern": {"layers.1.self_attn.o_proj": 10}},
            ["o_proj needs rank 20 in 2 layers"],
            "--rank 20 --alpha 10 --targets o_proj",
        ),
    ],
    ids=["rank", "targets", "rsLoRA", "DoRA", "apart", "pattern"],
)  # fmt: skip
def test_the_line_that_fits_takes_it_to_the_bit(
    tmp_path: Path, apart: bool, options: dict[str, Any], reasons: list[str], line: str
) -> None:
    """The line is read by the command line itself; a bundle of what it says takes the adapter without rounding."""
    peft_model(torch_model(apart=apart), **options).save_pretrained(tmp_path / "source")
    said = refusal(tmp_path / "source", SMALL, tmp_path / "bundle")
    assert all(reason in said for reason in reasons), said
    *_, last = said.splitlines()
    assert last == f"a bundle that takes it: edgetune prepare CHECKPOINT {line} --output BUNDLE"
    # click keeps the help option of the first context for good: it has to be that of the command line.
    group = click.Context(main, **main.context_settings)
    given = command.make_context("prepare", shlex.split(last.partition("edgetune prepare ")[2]), parent=group).params
    patterns = {key: dict(given[key]) for key in ("rank_pattern", "alpha_pattern")}
    fields = {key: given[key] for key in ("rank", "alpha", "targets", "rslora", "dora")}
    made = prepared_lora(PrepareConfig(**fields, **patterns))
    lora = prepared_lora(PrepareConfig(**fields, **patterns), slots_of(ARCHITECTURE, made.target_modules))
    norms = {slot.name: np.ones(slot.out_features, np.float32) for slot in lora.slots}
    found = read_foreign(tmp_path / "source", bundle_of(lora, tmp_path / "bundle", norms if lora.dora else None))
    assert found.filled and not found.rounded


def test_ranks_that_add_up_are_explained(tmp_path: Path) -> None:
    peft_model(torch_model(apart=True), r=8, target_modules=APART[:3]).save_pretrained(tmp_path / "source")
    said = refusal(tmp_path / "source", lora_of(16), tmp_path / "bundle")
    why = "the sum of q_proj 8, k_proj 8, v_proj 8, because each has an A of its own"
    assert f"qkv_proj needs rank 24 in 2 layers, {why}; the bundle has 16" in said


def test_a_rank_that_no_bundle_has_comes_without_a_line(tmp_path: Path) -> None:
    said = refusal(write_peft(tmp_path / "source", lora_of(100, 8.0)), SMALL, tmp_path / "bundle")
    assert said.endswith("no `edgetune prepare` line takes rank 100: 32 is the most; train a lower one")


@pytest.mark.parametrize(("scaling", "ours"), [(1.0, 2.0), (16.0, 2.0), (2.0, 2.0), (2 / 3, 8 / 3), (0.3, 1.2)])
def test_a_power_of_two_loses_nothing(scaling: float, ours: float) -> None:
    b = np.random.default_rng(0).normal(size=(50, 4)).astype(np.float32)
    scaled, is_exact = rescaled(b, scaling, ours)
    assert is_exact
    np.testing.assert_array_equal(scaled * np.float32(ours), b * np.float32(scaling))


@pytest.mark.parametrize(("scaling", "ours"), [(1.0, 3.0), (20.0, 2.0), (16 / np.sqrt(8), 2.0), (0.1, 7.0)])
def test_all_else_is_rounded_once(scaling: float, ours: float) -> None:
    """To the nearest float32 of the exact product, which is computed in fractions."""
    b = np.random.default_rng(0).normal(size=(20, 4)).astype(np.float32)
    scaled, is_exact = rescaled(b, scaling, ours)
    assert not is_exact
    for value, before in zip(scaled.flat, b.flat, strict=True):
        exact = Fraction(float(before)) * Fraction(scaling) / Fraction(ours)
        assert abs(Fraction(float(value)) - exact) <= Fraction(float(np.spacing(np.abs(value)))) * Fraction(1001, 2000)


def test_few_digits_stay_exact_with_any_scaling_of_few_digits() -> None:
    """As bfloat16 has them, of which float32 holds every product with 3."""
    b = (np.random.default_rng(0).normal(size=(50, 4)).astype(np.float32).view(np.uint32) & 0xFFFF0000).view(np.float32)
    scaled, is_exact = rescaled(b, 3.0, 1.0)
    assert is_exact
    np.testing.assert_array_equal(scaled.astype(np.float64), 3.0 * b.astype(np.float64))


def test_what_is_too_small_for_float32_is_said_to_be_rounded() -> None:
    """Some libraries switch such numbers off for the whole process: then they are zeros."""
    b = np.array([[1.1e-30, 1.0]], np.float32)
    assert rescaled(b, 1.0, 2.0)[1] and not rescaled(b, 1.0, 2.0**40)[1]
