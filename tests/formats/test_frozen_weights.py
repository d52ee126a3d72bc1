"""The index of the frozen weights: what it names lies in the bundle's own file, and is the bundle's model."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from edgetune.cli import main
from edgetune.errors import VerificationError
from edgetune.formats.bundle import MANIFEST, list_files, load_manifest, seal_bundle
from edgetune.formats.frozen_weights import FrozenWeights
from edgetune.formats.genai import WEIGHTS
from edgetune.formats.manifest import BundleManifest
from edgetune.formats.roles import INDEX
from edgetune.model.architecture import Architecture, tensor_shapes
from support.bundle_copy import copy_of_bundle
from support.golden import GOLDEN

NORM, EMBEDDING, HEAD = "model.norm.weight", "model.embed_tokens.weight", "lm_head.weight"
PROJECTION = "model.layers.0.mlp.down_proj.weight"
Index = dict[str, Any]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return copy_of_bundle(GOLDEN / "bundle", tmp_path / "bundle")


def architecture(folder: Path) -> Architecture:
    return load_manifest(folder / MANIFEST, BundleManifest).architecture


def change(folder: Path, changed: Callable[[Index], object]) -> None:
    """As an attacker would: with the right hashes."""
    index = json.loads((folder / INDEX).read_text())
    changed(index)
    (folder / INDEX).write_text(json.dumps(index))
    manifest = load_manifest(folder / MANIFEST, BundleManifest)
    (folder / MANIFEST).unlink()
    seal_bundle(folder, replace(manifest, files=list_files(folder, without=MANIFEST)))


def first(name: str, **values: object) -> Callable[[Index], object]:
    """A change of a tensor's first piece."""
    return lambda index: index["tensors"][name][0].update(values)


CHANGES: dict[str, tuple[Callable[[Index], object], str]] = {
    "another file": (lambda i: i.update(file="/tmp/outside.data"), "file is '/tmp/outside.data', expected 'model.onnx"),
    "a listed file": (lambda i: i.update(file="checkpoint"), "the weights' file is 'checkpoint'"),
    "no file": (lambda i: i.pop("file"), "cannot be read"),
    "not a number": (first(NORM, offset="near the end"), "cannot be read"),
    "an infinite number": (first(NORM, offset=float("inf")), "cannot be read"),
    "before the file": (first(NORM, offset=-8), f"{NORM} lies outside of {WEIGHTS}"),
    "scales before the file": (first(PROJECTION, scales=-8), f"{PROJECTION} lies outside of"),
    "behind the file": (first(NORM, offset=2**40), f"{NORM} lies outside of"),
    "scales behind the file": (first(PROJECTION, scales=2**40), f"{PROJECTION} lies outside of"),
    "an unknown layout": (first(PROJECTION, layout="int2"), "cannot be read"),
    "another layout": (first(PROJECTION, layout="transposed"), "has a transposed piece of shape .* with scales at"),
    "no scales": (first(PROJECTION, scales=None), "has a int4 piece of shape .* with scales at None"),
    "a norm in blocks": (first(NORM, layout="half"), r"model.norm.weight has a half piece of shape \[64\]"),
    "sizes below one": (first(PROJECTION, shape=[-64, -128]), r"has a int4 piece of shape \[-64, -128\]"),
    "no sizes": (first(NORM, shape=[]), r"has a plain piece of shape \[\]"),
    "three sizes": (first(PROJECTION, shape=[64, 64, 2]), "has a int4 piece of shape"),
    "part of a block": (first(PROJECTION, shape=[64, 120]), r"has a int4 piece of shape \[64, 120\]"),
    "no pieces": (lambda i: i["tensors"].update({PROJECTION: []}), f"{PROJECTION} has 0 pieces"),
    "a norm in two pieces": (lambda i: i["tensors"][NORM].append(i["tensors"][NORM][0]), f"{NORM} has 2 pieces"),
    "a missing tensor": (lambda i: i["tensors"].pop(PROJECTION), f"{PROJECTION} is missing"),
    "a missing head": (lambda i: i["tensors"].pop(HEAD), f"{HEAD} is missing"),
    "no tensors": (lambda i: i["tensors"].clear(), "has 0 tensors, the manifest says 2 layers"),
    "another shape": (first(EMBEDDING, shape=[511, 64]), rf"{EMBEDDING} has shape \(511, 64\), .* says \(512, 64\)"),
    "another norm": (first(NORM, shape=[32]), rf"{NORM} has shape \(32,\), the manifest says \(64,\)"),
}


@pytest.mark.parametrize("kind", CHANGES)
def test_an_index_that_points_elsewhere_is_refused(folder: Path, kind: str) -> None:
    changed, reason = CHANGES[kind]
    change(folder, changed)
    with pytest.raises(VerificationError, match=f"{folder / INDEX}: .*{reason}.*; copy the bundle again"):
        FrozenWeights(folder, architecture(folder))


def test_training_reads_no_byte_that_is_not_verified(folder: Path, tmp_path: Path) -> None:
    outside = shutil.copyfile(folder / WEIGHTS, tmp_path / "outside.data")
    change(folder, lambda index: index.update(file=str(outside)))
    arguments = ["train", folder, "--data", GOLDEN / "train.jsonl", "--output", tmp_path / "a", "--steps", 1]
    done = CliRunner().invoke(main, [*map(str, arguments), "--plan", "recompute"])
    assert (done.exit_code, "expected '" + WEIGHTS in done.stderr) == (5, True), done.output


def test_weights_of_another_model_are_not_split(folder: Path, tmp_path: Path) -> None:
    change(folder, first(NORM, shape=[32]))
    arguments = ["split", folder, "--data", GOLDEN / "train.jsonl", "--output", tmp_path / "halves"]
    done = CliRunner().invoke(main, [*map(str, arguments)])
    assert (done.exit_code, f"{NORM} has shape (32,)" in done.stderr) == (5, True), done.output
    assert not (tmp_path / "halves").exists()


def test_weights_that_are_gone_are_named(folder: Path) -> None:
    (folder / WEIGHTS).unlink()
    with pytest.raises(VerificationError, match=f"lies outside of {WEIGHTS}"):
        FrozenWeights(folder, architecture(folder))
    (folder / INDEX).unlink()
    with pytest.raises(VerificationError, match=r"weights\.json: cannot be read \(No such file"):
        FrozenWeights(folder, architecture(folder))


def test_a_tensor_that_is_not_there_is_named_when_it_is_asked_for(folder: Path) -> None:
    with pytest.raises(VerificationError, match=r"model\.layers\.2\.mlp\.down_proj\.weight is missing"):
        FrozenWeights(folder, architecture(folder)).shape("model.layers.2.mlp.down_proj.weight")


def test_what_prepare_wrote_is_whole() -> None:
    frozen = FrozenWeights(GOLDEN / "bundle", architecture(GOLDEN / "bundle"))
    for name, shape in tensor_shapes(architecture(GOLDEN / "bundle")).items():
        assert frozen.shape(name) == shape
