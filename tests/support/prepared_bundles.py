"""Whole bundles of the tiny Phi-3 variants, as `edgetune prepare` makes them."""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Protocol

import pytest

from edgetune.config import Base, PrepareConfig, Quantiser
from edgetune.formats.bundle import Bundle
from edgetune.model import pieces
from support.tiny_phi3 import VARIANTS, checkpoint, silent

CONFIG = PrepareConfig(rank=4, alpha=8.0, max_length=128)
"""`tiny_phi3.lora` describes the same slots."""
BASES: list[Base] = ["int4", "fp32"]
BUNDLES: list[tuple[str, Base]] = [(variant, base) for variant in VARIANTS for base in BASES]
each_bundle = pytest.mark.parametrize(("variant", "base"), [*BUNDLES, ("grouped-query", "int8"), ("partial", "fp16")])


class Prepared(Protocol):
    """Type of the fixture `prepared`: the bundle of a variant; tests must not change it."""

    def __call__(self, variant: str, base: Base) -> Bundle: ...


class InPieces(Protocol):
    """Type of the fixture `in_pieces`: what `prepare_in_pieces` makes of a variant; tests must not change it."""

    def __call__(self, variant: str) -> Bundle: ...


def prepare_tiny(variant: str, folder: Path, config: PrepareConfig) -> Bundle:
    return prepare_checkpoint(checkpoint(variant), folder, config)


def prepare_checkpoint(source: Path, folder: Path, config: PrepareConfig) -> Bundle:
    """Prepare with Olive in this process: its imports cost seconds, a build milliseconds."""
    from edgetune.preparation import genai_model, prepare

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("OLIVE_DISABLE_TELEMETRY", "1")
        patch.setattr(genai_model, "run_olive_pass", _run_olive_here)
        return prepare(str(source), folder, config, say=silent)


def prepare_standard(variant: str, base: Base, folder: Path) -> Bundle:
    return prepare_tiny(variant, folder, replace(CONFIG, base=base))


def prepare_in_pieces(variant: str, folder: Path, config: PrepareConfig = CONFIG) -> Bundle:
    """With limits so low that the sublayers of grouped-query variants are cut: 2 and 6 pieces, 1 and 2 wide ones."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pieces, "MOST_WEIGHTS", 12_500)
        patch.setattr(pieces, "MOST_WIDE_WEIGHTS", 60_000)
        return prepare_tiny(variant, folder, config)


def prepare_dora(variant: str, base: Base, folder: Path) -> Bundle:
    """With magnitudes; of int4 in pieces, where it has grouped queries."""
    config = replace(CONFIG, base=base, dora=True)
    if base == "int4" and variant == "grouped-query":
        return prepare_in_pieces(variant, folder, config)
    return prepare_tiny(variant, folder, config)


def _run_olive_here(
    name: str, config: Mapping[str, object], source: Path, output: Path, base: Base, quantiser: Quantiser
) -> None:
    from edgetune.host import olive_pass

    root = logging.getLogger()
    level, handlers = root.level, root.handlers[:]
    try:
        stored = {"source": str(source), "output": str(output), "base": base, "quantiser": quantiser}
        olive_pass._serve(json.dumps({"name": name, "config": dict(config), **stored}))
    finally:
        root.setLevel(level)
        root.handlers[:] = handlers
