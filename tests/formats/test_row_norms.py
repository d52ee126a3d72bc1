"""The row norms of a bundle with DoRA, what refuses a broken file, and adapters of the other kind."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from edgetune.config import Base
from edgetune.errors import IncompatibleError, VerificationError
from edgetune.formats.adapter import read_adapter, write_adapter
from edgetune.formats.bundle import MANIFEST, Bundle, list_files, load_bundle, seal_bundle
from edgetune.formats.frozen_weights import FrozenWeights
from edgetune.formats.manifest import ROW_NORMS, BundleManifest
from edgetune.formats.manifest_json import read_manifest, write_manifest
from edgetune.formats.row_norms import read_row_norms
from edgetune.model.lora import initial_parameters
from support.bundle_copy import opened_copy
from support.prepared_bundles import Prepared

VARIANT = "grouped-query"


@pytest.mark.parametrize("base", ["int4", "fp32"])
def test_norms_are_those_of_the_stored_weights(with_dora: Prepared, base: Base) -> None:
    bundle = with_dora(VARIANT, base)
    norms, frozen = read_row_norms(bundle), FrozenWeights(bundle.path, bundle.manifest.architecture)
    assert list(norms) == [slot.name for slot in bundle.manifest.lora.slots]
    for name, found in norms.items():
        expected = np.linalg.norm(frozen.whole(f"{name}.weight").astype(np.float64), axis=1)
        np.testing.assert_allclose(found, expected, rtol=1e-6, err_msg=name)


def test_a_bundle_without_dora_has_none(prepared: Prepared) -> None:
    assert not read_row_norms(prepared(VARIANT, "int4"))
    assert b'"dora"' not in (prepared(VARIANT, "int4").path / MANIFEST).read_bytes()


@pytest.mark.parametrize(
    ("change", "message"),
    [(lambda data: data[:-4], "norms, expected"), (lambda data: data[:-4] + b"\0\0\xc0\x7f", "no norm")],
    ids=["short", "NaN"],
)
def test_a_broken_file_is_refused(with_dora: Prepared, tmp_path: Path, change: object, message: str) -> None:
    bundle = opened_copy(with_dora(VARIANT, "int4"), tmp_path / "bundle")
    path = bundle.path / ROW_NORMS
    path.write_bytes(change(path.read_bytes()))  # type: ignore[operator]
    with pytest.raises(VerificationError, match=message):
        read_row_norms(bundle)


def test_slots_with_magnitudes_need_the_file(with_dora: Prepared, tmp_path: Path) -> None:
    bundle = opened_copy(with_dora(VARIANT, "int4"), tmp_path / "bundle")
    (bundle.path / ROW_NORMS).unlink()
    seal_bundle(bundle.path, replace(bundle.manifest, files=list_files(bundle.path, without=MANIFEST)))
    with pytest.raises(VerificationError, match=rf"magnitudes.*{ROW_NORMS}"):
        load_bundle(bundle.path)


def test_the_manifest_says_it_and_comes_back(with_dora: Prepared) -> None:
    manifest = with_dora(VARIANT, "int4").manifest
    again = read_manifest(write_manifest(manifest), BundleManifest, "it")
    assert again.lora == manifest.lora
    assert again.lora.dora


@pytest.mark.parametrize("contract", [True, False], ids=["edgetune's", "PEFT's"])
@pytest.mark.parametrize("dora", [True, False], ids=["DoRA in LoRA", "LoRA in DoRA"])
def test_an_adapter_of_the_other_kind_is_refused_by_name(
    prepared: Prepared, with_dora: Prepared, tmp_path: Path, dora: bool, contract: bool
) -> None:
    kinds = {True: with_dora(VARIANT, "fp32"), False: prepared(VARIANT, "fp32")}
    save(kinds[dora], tmp_path)
    if not contract:
        (tmp_path / "edgetune.json").unlink()
    of = kinds[not dora].manifest
    with pytest.raises(IncompatibleError) as error:
        read_adapter(tmp_path, of.lora, of.base, of.tokenizer, read_row_norms(kinds[not dora]))
    told = str(error.value)
    assert "DoRA" in told
    assert ("--dora" in told) == dora
    assert "edgetune prepare CHECKPOINT --rank 4" in told


def save(bundle: Bundle, folder: Path) -> None:
    of = bundle.manifest
    first = initial_parameters(of.lora, 0, read_row_norms(bundle))
    write_adapter(folder, base=of.base, tokenizer=of.tokenizer, lora=of.lora, parameters=first, provenance={})
