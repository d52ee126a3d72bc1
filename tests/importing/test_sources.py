"""Folders and files that are no adapter of this bundle's: what the command line says, and with which exit code."""

from __future__ import annotations

import io
import json
import os
import shutil
import tarfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner, Result
from safetensors.numpy import load_file, save_file

from edgetune.cli import main
from edgetune.cli.failures import exit_code_of
from edgetune.errors import EdgetuneError, IncompatibleError, UsageError, VerificationError
from edgetune.formats.adapter import CONFIG, WEIGHTS
from edgetune.formats.bundle import load_bundle
from edgetune.importing.sources import opened
from support.foreign_adapters import archived, as_mlx, docker_archive, oci_layout, tar_of, write_peft
from support.golden import BUNDLE
from support.small_checkpoint import POINTER

LORA = load_bundle(BUNDLE).manifest.lora
FIRST = "base_model.model.model.layers.0.self_attn.qkv_proj"
Change = Callable[[Path], Any]


def run_import(source: Path, output: Path) -> Result:
    return CliRunner().invoke(main, ["import", str(source), "--bundle", str(BUNDLE), "--output", str(output)])


def config(**changes: Any) -> Change:
    """Change what the configuration says."""

    def change(folder: Path) -> None:
        said = json.loads((folder / CONFIG).read_text())
        (folder / CONFIG).write_text(json.dumps(said | changes))

    return change


def tensors(how: Callable[[dict[str, np.ndarray]], Any]) -> Change:
    """Change the tensors."""

    def change(folder: Path) -> None:
        values = {name: value.copy() for name, value in load_file(folder / WEIGHTS).items()}
        how(values)
        save_file(values, folder / WEIGHTS)

    return change


def added(name: str, *shape: int) -> Change:
    return tensors(lambda values: values.update({name: np.ones(shape, np.float32)}))


def pickled(folder: Path) -> None:
    (folder / WEIGHTS).unlink()
    (folder / "adapter_model.bin").write_bytes(b"PK\x03\x04 a pickle")


def cut_off(folder: Path) -> None:
    data = (folder / WEIGHTS).read_bytes()
    (folder / WEIGHTS).write_bytes(data[:-100])


def emptied(folder: Path) -> None:
    for path in folder.iterdir():
        path.unlink()


def merged(folder: Path) -> None:
    emptied(folder)
    (folder / "config.json").write_text("{}")
    (folder / "model.safetensors").touch()


def several(folder: Path) -> None:
    for name in ("checkpoint-500", "checkpoint-1000"):
        shutil.copytree(folder, folder.parent / "several" / name)
    emptied(folder)
    (folder.parent / "several").rename(folder / "output")


def piped(folder: Path) -> None:
    (folder / WEIGHTS).unlink()
    os.mkfifo(folder / WEIGHTS)


def resized(module: str, width: int) -> Change:
    return tensors(lambda values: values.update({f"{module}.lora_A.weight": np.ones((4, width), np.float32)}))


def moved(old: str, new: str) -> Change:
    """Name tensors otherwise."""

    def how(values: dict[str, np.ndarray]) -> None:
        for name in [name for name in values if old in name]:
            values[name.replace(old, new)] = values.pop(name)

    return tensors(how)


def mlx(**said: Any) -> Change:
    def change(folder: Path) -> None:
        made = as_mlx(folder, folder.parent / "mlx", 2.0, 4, **said)
        emptied(folder)
        for path in made.iterdir():
            shutil.copy(path, folder)

    return change


def not_a_number(values: dict[str, np.ndarray]) -> None:
    values[f"{FIRST}.lora_B.weight"][0, 0] = np.nan


def as_type(dtype: type) -> Change:
    name = f"{FIRST}.lora_A.weight"
    return tensors(lambda values: values.update({name: values[name].astype(dtype)}))


FAULTS: dict[str, tuple[Change, type[EdgetuneError], str]] = {
    # nothing that could be imported
    "nothing": (shutil.rmtree, UsageError, "is not there; expected a LoRA adapter"),
    "an empty folder": (emptied, UsageError, "no adapter here or below (no adapter_config.json); give the folder"),
    "a whole model": (merged, UsageError, "holds a whole model, no adapter; where it was merged, train again"),
    "several checkpoints": (
        several,
        UsageError,
        "holds 2 adapters: output/checkpoint-1000, output/checkpoint-500; give",
    ),
    "no configuration": (lambda at: (at / CONFIG).unlink(), UsageError, "no adapter_config.json beside the tensors"),
    "no tensors": (
        lambda at: (at / WEIGHTS).unlink(),
        VerificationError,
        "no adapter_model.safetensors or adapters.saf",
    ),
    # files that cannot be read, or must not be
    "pickle": (pickled, VerificationError, "(adapter_model.bin is pickle, which can run code); save the adapter with"),
    "a pipe": (piped, VerificationError, "adapter_model.safetensors: a link or no regular file"),
    "cut off": (cut_off, VerificationError, "adapter_model.safetensors: is cut off: it has"),
    "not fetched": (
        lambda at: (at / WEIGHTS).write_bytes(POINTER),
        VerificationError,
        "a Git LFS pointer in the place",
    ),
    "garbage": (lambda at: (at / WEIGHTS).write_bytes(b"x" * 999), VerificationError, "not a valid safetensors file"),
    "no JSON": (lambda at: (at / CONFIG).write_text("{"), VerificationError, "adapter_config.json: not valid JSON"),
    "a list": (lambda at: (at / CONFIG).write_text("[]"), VerificationError, "expected a JSON object, found list"),
    "NaN": (
        tensors(not_a_number),
        VerificationError,
        "NaN or infinity in an update of model.layers.0.self_attn.qkv_proj",
    ),
    "mlx-lm's first archive": (
        lambda at: (at / WEIGHTS).rename(at / "adapters.npz"),
        VerificationError,
        "adapters.npz is of an early mlx-lm",
    ),
    "mlx-lm's words about PEFT's tensors": (
        lambda at: (at / CONFIG).write_text('{"lora_parameters": {"rank": 4, "scale": 2}}'),
        VerificationError,
        "mlx-lm's configuration and no adapters.safetensors",
    ),
    "PEFT's words about mlx-lm's tensors": (
        lambda at: (at / WEIGHTS).rename(at / "adapters.safetensors"),
        VerificationError,
        "PEFT's configuration beside mlx-lm's tensors",
    ),
    # other methods
    "another method": (config(peft_type="LOHA"), IncompatibleError, "peft_type is 'LOHA', expected 'LORA'"),
    "PiSSA": (
        config(init_lora_weights="pissa"),
        IncompatibleError,
        "init_lora_weights is 'pissa', which rewrites the base",
    ),
    "biases": (config(bias="all"), IncompatibleError, "bias is 'all'; edgetune takes LoRA without it"),
    "a bias of B": (
        added(f"{FIRST}.lora_B.bias", 192),
        IncompatibleError,
        "1 tensors are no A or B of a projection: base",
    ),
    "modules to save": (
        config(modules_to_save=["lm_head"]),
        IncompatibleError,
        "modules_to_save is ['lm_head']; edgetune",
    ),
    "a whole head": (
        added("base_model.model.lm_head.weight", 512, 64),
        IncompatibleError,
        "projection: base_model.model.lm_head.weight",
    ),
    "embeddings": (
        added("base_model.model.model.embed_tokens.lora_embedding_A", 4, 512),
        IncompatibleError,
        "embed_tokens.lora_emb",
    ),
    "copied layers": (
        config(layer_replication=[[0, 2], [0, 2]]),
        IncompatibleError,
        "layer_replication is [[0, 2], [0, 2]]",
    ),
    "transposed weights": (
        config(fan_in_fan_out=True),
        IncompatibleError,
        "fan_in_fan_out is True; edgetune takes LoRA",
    ),
    "what is not known yet": (
        config(from_the_future=1),
        IncompatibleError,
        "from_the_future is 1; edgetune takes LoRA",
    ),
    "mlx-lm, all weights": (
        mlx(fine_tune_type="full"),
        IncompatibleError,
        "fine_tune_type is 'full', expected 'lora' or",
    ),
    "DoRA": (
        lambda at: (config(use_dora=True)(at), tensors(with_magnitudes)(at)),
        IncompatibleError,
        "it is DoRA, with magnitudes, and the bundle's slots are plain LoRA, without magnitudes\n"
        "a bundle that takes it: "
        "edgetune prepare CHECKPOINT --rank 4 --alpha 8 --dora --targets all-linear --output BUNDLE",
    ),
    # what contradicts itself
    "no rank": (
        config(r=None),
        IncompatibleError,
        "r is None, lora_alpha 8.0 and use_rslora None, expected a whole number",
    ),
    "no alpha": (
        config(lora_alpha=0),
        IncompatibleError,
        "lora_alpha 0 and use_rslora None, expected a whole number, a",
    ),
    "another rank": (config(r=8), IncompatibleError, "has matrices of rank 4, its configuration says 8"),
    "a hostile pattern": (
        config(rank_pattern={"([a-z_.]+)+1x": 4}),
        IncompatibleError,
        "rank_pattern is {'([a-z_.]+)+1x': 4}, expected",
    ),
    "no B": (
        tensors(lambda values: values.pop(f"{FIRST}.lora_B.weight")),
        IncompatibleError,
        "layers.0.self_attn.qkv_proj has no B",
    ),
    "magnitudes without DoRA": (
        added(f"{FIRST}.lora_magnitude_vector", 192),
        IncompatibleError,
        "says that there is no DoRA",
    ),
    "DoRA without magnitudes": (config(use_dora=True), IncompatibleError, "o_proj has no magnitudes"),
    "several adapters": (
        added(f"{FIRST}.lora_A.kitchen.weight", 4, 64),
        IncompatibleError,
        "holds several adapters: one without a name, kitchen; save one",
    ),
    "double precision": (as_type(np.float64), IncompatibleError, "is of type F64, expected F32, F16, BF16"),
    "whole numbers": (as_type(np.int8), IncompatibleError, "is of type I8, expected F32, F16, BF16"),
    "no matrix": (
        tensors(lambda values: values.update({f"{FIRST}.lora_A.weight": np.ones(256, np.float32)})),
        IncompatibleError,
        "A [256] and B [192, 4], no matrices",
    ),
    "no tensors of LoRA": (tensors(dict.clear), IncompatibleError, "there are no tensors of LoRA"),
    "mlx-lm's alpha": (
        mlx(lora_parameters={"rank": 4, "scale": 2.0, "alpha": 16}),
        IncompatibleError,
        "early releases of mlx-lm scaled by scale · alpha / rank, later ones by scale alone",
    ),
    "mlx-lm without a rank": (
        mlx(lora_parameters={"scale": 2.0}),
        IncompatibleError,
        "expected a whole number as rank",
    ),
    # what does not fit the bundle
    "another model": (
        resized(FIRST, 128),
        IncompatibleError,
        "qkv_proj takes 128 and gives 192 features, the bundle's 64 and 192: it was trained on another model",
    ),
    "more layers": (
        moved("layers.1.", "layers.31."),
        IncompatibleError,
        "model.layers.31.mlp.down_proj is no projection of the bundle's model, which has 2 layers",
    ),
    "another projection": (
        moved("o_proj", "dense_proj"),
        IncompatibleError,
        "self_attn.dense_proj is no projection of the bundle's model",
    ),
    "whole and apart": (
        lambda at: (
            added(f"{FIRST[:-8]}q_proj.lora_A.weight", 4, 64)(at),
            added(f"{FIRST[:-8]}q_proj.lora_B.weight", 64, 4)(at),
        ),
        IncompatibleError,
        "qkv_proj is there as a whole and in parts, qkv_proj, q_proj; save one",
    ),
    "a scaling beyond float32": (
        config(lora_alpha=1e300),
        IncompatibleError,
        "its scaling by the bundle's, leaves what float32 holds",
    ),
}


def with_magnitudes(values: dict[str, np.ndarray]) -> None:
    for slot in LORA.slots:
        values[f"base_model.model.{slot.magnitude}"] = np.ones(slot.out_features, np.float32)


@pytest.mark.parametrize("fault", FAULTS)
def test_what_is_no_adapter_of_the_bundles_is_refused(tmp_path: Path, fault: str) -> None:
    change, error, reason = FAULTS[fault]
    source = write_peft(tmp_path / "source", LORA)
    change(source)
    done = run_import(source, tmp_path / "adapter")
    assert reason in done.stderr, done.stderr
    assert done.exit_code == exit_code_of(error)
    assert done.stderr.startswith("error: ") and done.stdout == ""
    assert [path.name for path in tmp_path.iterdir() if "adapter" in path.name] == []


def test_the_adapter_that_the_faults_are_made_of_is_taken(tmp_path: Path) -> None:
    done = run_import(write_peft(tmp_path / "source", LORA), tmp_path / "adapter")
    assert done.exit_code == 0, done.output


@pytest.mark.parametrize("folder", ["bundle", "model", "shipped"])
def test_edgetunes_other_folders_are_named(tmp_path: Path, folder: str) -> None:
    mark = {"bundle": "manifest.json", "model": "genai_config.json", "shipped": "target.json"}[folder]
    (tmp_path / mark).write_text("{}")
    done = run_import(tmp_path, tmp_path / "adapter")
    assert done.exit_code == exit_code_of(UsageError)
    assert "; expected a LoRA adapter: make one with" in done.stderr


# --- archives


def image_with(files: dict[str, bytes | Path], folder: Path) -> Path:
    path = folder / "image.tar"
    path.write_bytes(docker_archive([tar_of(files)]))
    return path


def linked(folder: Path) -> Path:
    """An image whose tensors are a link to a file of whoever reads it."""
    buffer = io.BytesIO()
    source = write_peft(folder / "source", LORA)
    with tarfile.open(fileobj=buffer, mode="w") as made:
        made.add(source / CONFIG, f"data/{CONFIG}")
        member = tarfile.TarInfo(f"data/{WEIGHTS}")
        member.type, member.linkname = tarfile.SYMTYPE, str(source / WEIGHTS)
        made.addfile(member)
    (folder / "image.tar").write_bytes(docker_archive([buffer.getvalue()]))
    return folder / "image.tar"


def own_in_archive(folder: Path) -> Path:
    source = write_peft(folder / "source", LORA)
    assert run_import(source, folder / "made").exit_code == 0
    (folder / "own.tar").write_bytes(tar_of(archived(folder / "made")))
    shutil.rmtree(folder / "made")
    return folder / "own.tar"


def one_file(folder: Path) -> Path:
    return write_peft(folder / "source", LORA) / WEIGHTS


def written(folder: Path, name: str, data: bytes) -> Path:
    (folder / name).write_bytes(data)
    return folder / name


ARCHIVES: dict[str, tuple[Callable[[Path], Path], type[EdgetuneError], str]] = {
    "no archive": (lambda at: written(at, "x.tar", b"x" * 2000), VerificationError, "x.tar: is no tar archive"),
    "a zip": (lambda at: written(at, "x.zip", b"PK\x03\x04" + bytes(99)), VerificationError, "is packed with zip"),
    "zstd": (
        lambda at: written(at, "x.tar.zst", b"\x28\xb5\x2f\xfd" + bytes(99)),
        VerificationError,
        "packed with zstd",
    ),
    "an image without an adapter": (
        lambda at: image_with({"etc/os-release": b""}, at),
        UsageError,
        "no adapter here or",
    ),
    "a layer that leads out": (
        lambda at: image_with({f"data/../../{CONFIG}": b"{}"}, at),
        VerificationError,
        "layer 0: has a member that leads out",
    ),
    "a link": (linked, VerificationError, "image.tar, data: adapter_model.safetensors: a link or no regular file"),
    "pickle in an image": (
        lambda at: image_with({f"data/{CONFIG}": b"{}", "data/adapter_model.bin": b""}, at),
        VerificationError,
        "is pickle",
    ),
    "a broken configuration in an image": (
        lambda at: image_with({f"data/{CONFIG}": b"{", f"data/{WEIGHTS}": b""}, at),
        VerificationError,
        "image.tar, layer 0, data/adapter_config.json: not valid JSON",
    ),
    "a whole model in an archive": (
        lambda at: written(at, "x.tar", tar_of({"model/model.safetensors": bytes(99)})),
        UsageError,
        "x.tar: holds a whole model, no adapter",
    ),
    "an image without its blobs": (
        lambda at: (oci_layout(at / "oci", [tar_of({})]), shutil.rmtree(at / "oci" / "blobs"))[0],
        VerificationError,
        "is missing or no regular file; copy the image again",
    ),
    "an adapter of edgetune in an archive": (
        own_in_archive,
        UsageError,
        "is an adapter of edgetune in an archive; unpack",
    ),
    "the tensors alone": (one_file, UsageError, "is one file of an adapter; give the folder that it lies in"),
}


@pytest.mark.parametrize("fault", ARCHIVES)
def test_archives_that_hold_no_adapter_are_refused(tmp_path: Path, fault: str) -> None:
    make, error, reason = ARCHIVES[fault]
    done = run_import(make(tmp_path), tmp_path / "adapter")
    assert reason in done.stderr, done.stderr
    assert done.exit_code == exit_code_of(error)
    assert not (tmp_path / "adapter").exists()


# --- where it looks


def test_the_folder_that_lies_least_deep_counts(tmp_path: Path) -> None:
    """As the trainers of Hugging Face leave it: the adapter, and states of the run below it."""
    write_peft(tmp_path / "run", LORA)
    write_peft(tmp_path / "run" / "checkpoint-10", replace(LORA, rank=1))
    with opened(tmp_path / "run") as found:
        assert found.config == tmp_path / "run" / CONFIG


def test_links_to_folders_are_not_followed(tmp_path: Path) -> None:
    write_peft(tmp_path / "elsewhere", LORA)
    (tmp_path / "source").mkdir()
    (tmp_path / "source" / "link").symlink_to(tmp_path / "elsewhere", target_is_directory=True)
    (tmp_path / "source" / "circle").symlink_to(tmp_path / "source", target_is_directory=True)
    with pytest.raises(UsageError, match="no adapter here or below"), opened(tmp_path / "source"):
        pass


def test_a_snapshot_of_the_hub_is_read(tmp_path: Path) -> None:
    """Its files are links to blobs."""
    write_peft(tmp_path / "blobs", LORA)
    snapshot = tmp_path / "snapshots" / "1"
    snapshot.mkdir(parents=True)
    for name in (CONFIG, WEIGHTS):
        (snapshot / name).symlink_to(tmp_path / "blobs" / name)
    assert run_import(snapshot, tmp_path / "adapter").exit_code == 0


def test_a_large_folder_is_left_early(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from edgetune.importing import sources

    monkeypatch.setattr(sources, "_MOST_ENTRIES", 20)
    for number in range(21):
        (tmp_path / f"{number}").touch()
    with pytest.raises(UsageError, match="has more than 20 files; give the adapter's own folder"), opened(tmp_path):
        pass


def test_nothing_is_left_of_what_was_unpacked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    scratch = tmp_path / "scratch"
    scratch.mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(scratch))
    source = write_peft(tmp_path / "source", LORA)
    image = image_with({f"data/{name}": path for name, path in archived(source).items()}, tmp_path)
    assert run_import(image, tmp_path / "adapter").exit_code == 0
    assert run_import(image_with({f"data/{CONFIG}": b"{}"}, tmp_path), tmp_path / "other").exit_code != 0
    assert list(scratch.iterdir()) == []
