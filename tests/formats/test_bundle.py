"""Opening a bundle: every listed byte is checked, and nothing else is read."""

from __future__ import annotations

import dataclasses
import os
import random
import shutil
import signal
import socket
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from edgetune.cli.inputs import bundle_at
from edgetune.describe import describe
from edgetune.errors import EdgetuneError, IncompatibleError, LockedError, UsageError, VerificationError
from edgetune.formats.adapter import read_adapter
from edgetune.formats.bundle import (
    LARGEST_MANIFEST,
    MANIFEST,
    Bundle,
    list_files,
    load_bundle,
    load_manifest,
    seal_bundle,
    verify_files,
)
from edgetune.formats.genai import open_model
from edgetune.formats.manifest import BundleManifest, File, Graph, TensorSpec
from edgetune.formats.storage import locked
from edgetune.model.lora import Lora, initial_parameters
from support.bundle_copy import copy_of_bundle
from support.small_checkpoint import POINTER
from support.tiny_bundle import LORA, SLOT, make_bundle

NAMES = ["loss.onnx", "parts/extra.bin", "tokenizer.json"]
replace = dataclasses.replace


@pytest.fixture(scope="session")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A bundle with a file in a folder."""
    folder = tmp_path_factory.mktemp("bundles") / "bundle"
    bundle = make_bundle(folder)
    (folder / "parts").mkdir()
    (folder / "parts" / "extra.bin").write_bytes(bytes(range(256)) * 8)
    seal_bundle(folder, replace(bundle.manifest, files=list_files(folder, without=MANIFEST)))
    return folder


@pytest.fixture
def folder(made: Path, tmp_path: Path) -> Path:
    return copy_of_bundle(made, tmp_path / "bundle")


@pytest.fixture(autouse=True)
def no_hang() -> Iterator[None]:
    """Reading a pipe that nobody writes to would never end."""

    def late(*_: object) -> None:
        raise TimeoutError("hangs")

    signal.signal(signal.SIGALRM, late)
    signal.alarm(30)
    yield
    signal.alarm(0)


def reseal(folder: Path, change: Callable[[BundleManifest], BundleManifest]) -> None:
    """As an attacker would: with the right hash of the manifest."""
    manifest = load_manifest(folder / MANIFEST, BundleManifest)
    (folder / MANIFEST).unlink()
    seal_bundle(folder, change(manifest))


def test_a_bundle_opens(folder: Path) -> None:
    bundle = load_bundle(folder)
    assert sorted(file.path for file in bundle.manifest.files) == NAMES
    assert bundle.file("loss") == folder / "loss.onnx"
    with pytest.raises(VerificationError, match="no graph for 'step'"):
        bundle.file("step")


def test_a_bundle_opens_behind_a_link_and_read_only(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "current").symlink_to(folder)
    for path in [folder, *folder.rglob("*")]:
        path.chmod(0o500)
    try:
        assert isinstance(load_bundle(tmp_path / "current"), Bundle)
    finally:
        for path in [folder, *folder.rglob("*")]:
            path.chmod(0o700)


# --- one file is not what it was


def flip_first(path: Path) -> None:
    flip(path, 0)


def flip_last(path: Path) -> None:
    flip(path, -1)


def flip(path: Path, index: int, bit: int = 0) -> None:
    data = bytearray(path.read_bytes())
    data[index] ^= 1 << bit
    path.write_bytes(data)


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


def lengthen(path: Path) -> None:
    path.write_bytes(path.read_bytes() + b"\0")


def empty(path: Path) -> None:
    path.write_bytes(b"")


def soft_link(path: Path) -> None:
    target = path.rename(path.with_name(".target"))
    path.symlink_to(target)


def dangling_link(path: Path) -> None:
    path.unlink()
    path.symlink_to("nowhere")


def circular_link(path: Path) -> None:
    path.unlink()
    path.symlink_to(path.name)


def become_folder(path: Path) -> None:
    path.unlink()
    path.mkdir()


def become_pipe(path: Path) -> None:
    path.unlink()
    os.mkfifo(path)


def become_socket(path: Path) -> None:
    path.unlink()
    here = Path.cwd()
    os.chdir(path.parent)  # the whole path is too long for a socket's name
    try:
        with socket.socket(socket.AF_UNIX) as listener:
            listener.bind(path.name)
    finally:
        os.chdir(here)


def become_endless(path: Path) -> None:
    path.unlink()
    path.symlink_to("/dev/zero")


DAMAGE: dict[Callable[[Path], object], str] = {
    flip_first: "was changed: SHA-256 is [0-9a-f]{16}…, its manifest says [0-9a-f]{16}…",
    flip_last: "was changed",
    truncate: r"has [\d,]+ bytes, its manifest says [\d,]+",
    lengthen: r"has [\d,]+ bytes, its manifest says [\d,]+",
    empty: r"has 0 bytes, its manifest says [\d,]+",
    Path.unlink: "is missing",
    soft_link: "is a link",
    dangling_link: "is a link",
    circular_link: "is a link",
    become_folder: "is not a regular file",
    become_pipe: "is not a regular file",
    become_socket: "is not a regular file",
    become_endless: "is a link",
}


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("damage", DAMAGE, ids=lambda damage: damage.__name__)
def test_a_damaged_file_is_named(folder: Path, name: str, damage: Callable[[Path], object]) -> None:
    damage(folder / name)
    with pytest.raises(VerificationError, match=f"{folder / name} {DAMAGE[damage]}") as caught:
        load_bundle(folder)
    assert [other for other in NAMES if f"{folder / other} " in str(caught.value)] == [name]
    fix = str(caught.value).splitlines()[-1]
    if DAMAGE[damage] == "is a link":
        copy = f"copy it with `cp -rL {folder} COPY`"
        if damage in (dangling_link, circular_link):
            assert "is a link that leads nowhere" in str(caught.value)
            copy = f"copy {folder} again from its source with `cp -rL`"
        assert fix.endswith(f"{copy}, or fetch it from the hub with `--local-dir`")
    else:
        assert fix.startswith(f"copy {folder} again from its source")


@pytest.mark.parametrize("name", [*NAMES, MANIFEST])
def test_a_file_that_git_has_not_fetched_is_named(folder: Path, name: str) -> None:
    (folder / name).write_bytes(POINTER)
    with pytest.raises(VerificationError, match=f"{folder / name}.*Git LFS pointer in the place of 4,972,489,328"):
        load_bundle(folder)


def test_all_problems_are_told_at_once(folder: Path) -> None:
    truncate(folder / "loss.onnx")
    shutil.rmtree(folder / "parts")
    flip_last(folder / "tokenizer.json")
    with pytest.raises(VerificationError) as caught:
        load_bundle(folder)
    loss, extra, tokenizer, fix = str(caught.value).splitlines()
    assert ("bytes" in loss, "is missing" in extra, "was changed" in tokenizer) == (True, True, True)
    assert fix.startswith("copy ")


def test_random_bit_flips_are_detected(folder: Path) -> None:
    generator = random.Random(0)
    good = {name: (folder / name).read_bytes() for name in [*NAMES, MANIFEST]}
    for _ in range(1000):
        name = generator.choice(list(good))
        flip(folder / name, generator.randrange(len(good[name])), generator.randrange(8))
        with pytest.raises((VerificationError, IncompatibleError), match=name):
            load_bundle(folder)
        (folder / name).write_bytes(good[name])
    load_bundle(folder)


def test_a_file_in_the_place_of_a_folder(folder: Path) -> None:
    shutil.rmtree(folder / "parts")
    (folder / "parts").write_text("")
    with pytest.raises(VerificationError, match=r"extra\.bin is missing"):
        load_bundle(folder)


def test_a_folder_behind_a_link(folder: Path, tmp_path: Path) -> None:
    (folder / "parts").rename(tmp_path / "parts")
    (folder / "parts").symlink_to(tmp_path / "parts")
    with pytest.raises(VerificationError, match=r"extra\.bin lies behind a link\n.*cp -rL"):
        load_bundle(folder)


def test_links_and_damage_have_a_fix_each(folder: Path) -> None:
    soft_link(folder / "loss.onnx")
    truncate(folder / "tokenizer.json")
    with pytest.raises(VerificationError, match=r"(?s)is a link\n.*has .* bytes.*\n.*cp -rL.*\ncopy .* again"):
        load_bundle(folder)


def test_links_that_were_copied_without_what_they_lead_to_are_named(folder: Path, tmp_path: Path) -> None:
    """As `cp -r` leaves a folder of the hub's cache: it must not look like a folder of something else."""
    for path in [path for path in folder.rglob("*") if path.is_file()]:
        path.unlink()
        path.symlink_to(tmp_path / "blobs" / path.name)
    found = f"{folder / MANIFEST} is a link that leads nowhere; .*copy {folder} again from its source with `cp -rL`"
    for opening in (load_bundle, open_model, describe, bundle_at):
        with pytest.raises(VerificationError, match=found):
            opening(folder)


def test_a_folder_of_links_opens_once_it_is_copied_as_told(folder: Path, tmp_path: Path) -> None:
    links, copy = tmp_path / "links", tmp_path / "copy"
    subprocess.run(["cp", "-rs", folder, links], check=True)
    with pytest.raises(VerificationError, match=rf"{MANIFEST} is a link; .*`cp -rL {links} COPY`.*`--local-dir`"):
        load_bundle(links)
    (links / MANIFEST).unlink()
    shutil.copyfile(folder / MANIFEST, links / MANIFEST)
    with pytest.raises(VerificationError) as caught:
        load_bundle(links)
    *problems, fix = str(caught.value).splitlines()
    assert len(problems) == len(NAMES) and all(problem.endswith("is a link") for problem in problems)
    assert f"`cp -rL {links} COPY`" in fix
    subprocess.run(["cp", "-rL", links, copy], check=True)
    load_bundle(copy)


def test_a_failing_disk_is_told(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(path: Path) -> str:
        raise OSError(5, "Input/output error", str(path))

    monkeypatch.setattr("edgetune.formats.bundle.sha256_of", fail)
    with pytest.raises(VerificationError, match=r"loss\.onnx cannot be read \(Input/output error\)"):
        load_bundle(folder)


def test_hard_links_are_files_like_others(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "store").hardlink_to(folder / "loss.onnx")
    load_bundle(folder)
    flip_last(tmp_path / "store")
    with pytest.raises(VerificationError, match=r"loss\.onnx was changed"):
        load_bundle(folder)


# --- the manifest itself


@pytest.mark.parametrize(
    "path",
    [
        "../outside", "parts/../../outside", "parts/..", "..", ".", "", "/", "//", "parts//extra.bin", "./loss.onnx",
        "parts/", "x" * 256, "x/" * 1_000_000,
        "..\\outside", "C:outside", "C:\\outside", "loss.onnx\0", "loss.onnx:stream", "/etc/hostname",
    ],
)  # fmt: skip
def test_a_path_that_leads_out_is_refused(folder: Path, path: str) -> None:
    (folder.parent / "outside").write_bytes(b"")
    reseal(folder, lambda m: replace(m, files=[*m.files, File(path, 0, "x")]))
    with pytest.raises(VerificationError, match="is not the path of a file inside") as caught:
        load_bundle(folder)
    assert repr(path)[:80] in str(caught.value)
    assert len(str(caught.value)) < 1000


@pytest.mark.parametrize("path", ["ü" * 200, "x/" * 100 + "x", "loss.onnx/x", "ünlisted", "...", "..x"])
def test_a_path_that_cannot_be_is_a_missing_or_unreadable_file(folder: Path, path: str) -> None:
    reseal(folder, lambda m: replace(m, files=[*m.files, File(path, 0, "x")]))
    with pytest.raises(VerificationError, match=r"is missing|cannot be read \(File name too long\)"):
        load_bundle(folder)


def test_a_file_is_listed_once(folder: Path) -> None:
    reseal(folder, lambda m: replace(m, files=[replace(m.files[0], sha256="0" * 64), *m.files]))
    with pytest.raises(VerificationError, match=r"loss\.onnx is listed 2 times"):
        load_bundle(folder)


@pytest.mark.parametrize(
    ("sizes", "reason"),
    [
        ({"hidden_size": 0}, "hidden_size is 0, expected 1 to"),
        ({"num_hidden_layers": 0, "vocab_size": 2**31}, "num_hidden_layers is 0.*\n.*vocab_size is 2147483648"),
        ({"sliding_window": 0}, "sliding_window is 0"),
        ({"num_key_value_heads": 2}, "num_attention_heads is 1, which is no multiple of num_key_value_heads 2"),
        ({"rope": {"dim": 0}}, "rope.dim is 0, expected an even number from 2 to head_dim 8"),
        ({"rope": {"dim": 10}}, "rope.dim is 10"),
        ({"rope": {"long_factor": [1.0]}}, "rope.long_factor has 1 numbers, expected 4"),
        ({"rope": {"theta": 0.0}}, "rope.theta is 0, expected a number above 0"),
        ({"rope": {"attention_factor": -1.0}}, "rope.attention_factor is -1"),
        ({"rope": {"short_factor": [1.0, 2.0, 0.0, 1.0]}}, "rope.short_factor is 0"),
        ({"num_hidden_layers": 3}, "num_hidden_layers is 3, and the highest layer with LoRA parameters is 0"),
        ({"max_position_embeddings": 11}, "max_length is 12, expected 2 to max_position_embeddings 11"),
    ],
)
def test_sizes_that_no_model_has_are_refused(folder: Path, sizes: dict[str, Any], reason: str) -> None:
    def change(manifest: BundleManifest) -> BundleManifest:
        rope = replace(manifest.architecture.rope, **sizes.get("rope", {}))
        plain = {name: value for name, value in sizes.items() if name != "rope"}
        return replace(manifest, architecture=replace(manifest.architecture, rope=rope, **plain))

    reseal(folder, change)
    with pytest.raises(VerificationError, match=reason):
        load_bundle(folder)


def slots(*sizes: tuple[int, int], rank: int = 4) -> Lora:
    return replace(LORA, rank=rank, slots=[replace(SLOT, in_features=ins, out_features=outs) for ins, outs in sizes])


def takes(name: str, shape: list[int | str]) -> Graph:
    return Graph("loss", "loss.onnx", [TensorSpec(name, "float", shape)], [])


TABLE = "rope_cos"
IMPOSSIBLE: dict[str, tuple[dict[str, Any], str]] = {
    "no inputs": ({"lora": slots((0, 16))}, f"slot '{SLOT.name}' takes 0 and gives 16 features, expected 1 to 2,147"),
    "no outputs": ({"lora": slots((16, 0))}, "takes 16 and gives 0 features"),
    "a slot twice": ({"lora": slots((16, 16), (16, 8))}, f"slot '{SLOT.name}' is there 2 times"),
    "rank": ({"lora": slots((8, 16), rank=17)}, "lora.rank is 17, expected at most the 16 features of the widest slot"),
    "huge rank": ({"lora": slots((8, 16), rank=2**60)}, "lora.rank is 1152921504606846976.*\n.*the slots have"),
    "huge slot": ({"lora": slots((2**30, 2**30), rank=2**20)}, "the slots have 2,251,799,813,685,248 parameters"),
    "one token": ({"max_length": 1}, "max_length is 1, expected 2 to max_position_embeddings 64"),
    "many tokens": ({"max_length": 2**40}, "max_length is 1099511627776"),
    "other parameters": (
        {"graphs": [takes(SLOT.a, [4, 17])]},
        r"lora_A.weight of shape \[4, 17\], .* \[4, 16\]",
    ),
    "too few parameters": ({"graphs": [takes(SLOT.a, [4, 16])]}, r"lora_B.weight of shape None, .* \[16, 4\]"),
    "another layer": ({"graphs": [takes("model.x.lora_A.weight", [1])]}, "the loss graph takes model.*, the slots' is"),
    "a table": (
        {"graphs": [takes(TABLE, ["b", "s", 4])]},
        r"takes rope_cos of shape \['b', 's', 4\], rope.dim is 8",
    ),
    "no table": ({"graphs": [takes(TABLE, [])]}, r"graph takes rope_cos of shape \[\], rope.dim is 8"),
}


@pytest.mark.parametrize("kind", IMPOSSIBLE)
def test_parameters_and_rows_that_no_bundle_has_are_refused(folder: Path, kind: str) -> None:
    changes, reason = IMPOSSIBLE[kind]
    reseal(folder, lambda m: replace(m, **changes))
    with pytest.raises(VerificationError, match=reason):
        load_bundle(folder)


@pytest.mark.parametrize("pad", [16, 2**40])
def test_rows_are_padded_with_a_token(folder: Path, pad: int) -> None:
    reseal(folder, lambda m: replace(m, tokenizer=replace(m.tokenizer, pad_token_id=pad)))
    with pytest.raises(VerificationError, match=f"pad_token_id is {pad}, expected a token of the vocabulary: 0 to 15"):
        load_bundle(folder)


def test_a_bundle_without_slots_opens_and_trains_nothing(folder: Path) -> None:
    reseal(folder, lambda m: replace(m, lora=replace(LORA, slots=[])))
    manifest = load_bundle(folder).manifest
    with pytest.raises(VerificationError, match="lists no LoRA slots, so there is nothing to train; make it anew"):
        initial_parameters(manifest.lora, seed=0)
    with pytest.raises(VerificationError, match="lists no LoRA slots"):
        read_adapter(folder, manifest.lora, manifest.base, manifest.tokenizer)


@pytest.mark.parametrize("file", ["../outside.onnx", "/tmp/outside.onnx", "parts", "unlisted.onnx", ""])
def test_a_graph_has_to_be_a_listed_file(folder: Path, file: str) -> None:
    reseal(folder, lambda m: replace(m, graphs=[*m.graphs, Graph("step", file, [], [])]))
    with pytest.raises(VerificationError, match=f"the step graph is {file!r}, which is not a listed file"):
        load_bundle(folder)


def test_what_pins_the_tokenizer_has_to_agree_with_the_files(folder: Path) -> None:
    reseal(folder, lambda m: replace(m, tokenizer=replace(m.tokenizer, sha256="0" * 64)))
    with pytest.raises(VerificationError, match=r"tokenizer\.json has SHA-256 [0-9a-f]+ among the files, 0+ with"):
        load_bundle(folder)


def test_a_template_has_to_be_pinned(folder: Path) -> None:
    (folder / "chat_template.jinja").write_text("{{ messages }}")
    reseal(folder, lambda m: replace(m, files=list_files(folder, without=MANIFEST)))
    with pytest.raises(
        VerificationError, match=r"chat_template\.jinja has SHA-256 [0-9a-f]+ .* None with the tokenizer"
    ):
        load_bundle(folder)


@pytest.mark.parametrize(
    "name",
    [
        "chat_template.jinja", "added_tokens.json", "more.onnx", "more.bin", "model.safetensors", "model.onnx.data",
        "layers/x.onnx",
    ],
)  # fmt: skip
def test_an_unlisted_file_that_something_might_read_is_refused(folder: Path, name: str) -> None:
    (folder / "layers").mkdir()
    (folder / "layers" / "listed.onnx").write_text("{}")
    reseal(folder, lambda m: replace(m, files=list_files(folder, without=MANIFEST)))
    (folder / name).write_text("{}")
    with pytest.raises(VerificationError, match=f"{name} is in the folder and not listed; move it elsewhere"):
        load_bundle(folder)


def test_unlisted_files_that_nothing_reads_are_left_alone(folder: Path) -> None:
    for name in ("README.md", "train.jsonl", "LICENSE", ".DS_Store", ".hidden.json"):
        (folder / name).write_text("")
    (folder / "adapter").mkdir()
    (folder / "adapter" / "adapter_config.json").write_text("{}")
    load_bundle(folder)


def test_a_changed_manifest_is_refused(folder: Path) -> None:
    text = (folder / MANIFEST).read_text()
    (folder / MANIFEST).write_text(text.replace('"max_length": 12', '"max_length": 13'))
    with pytest.raises(VerificationError, match=f"{MANIFEST}: was changed after it was written"):
        load_bundle(folder)


@pytest.mark.parametrize("damage", [soft_link, become_endless])
def test_a_manifest_that_is_no_regular_file_is_refused(folder: Path, damage: Callable[[Path], object]) -> None:
    damage(folder / MANIFEST)
    with pytest.raises(EdgetuneError, match=r"is a link; .*cp -rL|no bundle here"):
        load_bundle(folder)


def test_a_huge_manifest_is_not_read(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with (folder / MANIFEST).open("r+b") as file:
        file.truncate(LARGEST_MANIFEST + 1)
    monkeypatch.setattr(Path, "read_bytes", None)
    with pytest.raises(VerificationError, match=r"has 16,777,217 bytes, a manifest has at most 16,777,216"):
        load_bundle(folder)


# --- where there is no bundle


def test_no_bundle_is_a_usage_error_with_the_fix(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    (tmp_path / "empty").mkdir()
    (tmp_path / "pipe").mkdir()
    os.mkfifo(tmp_path / "pipe" / MANIFEST)
    for name in ("absent", "file", "empty", "pipe"):
        with pytest.raises(UsageError, match=rf"{name}: no bundle here \(no manifest.json\); make one with `edgetune"):
            load_bundle(tmp_path / name)


def test_a_replacement_that_was_cut_off_is_undone(folder: Path) -> None:
    previous = folder.rename(folder.parent / ".bundle.previous")
    with locked(folder), pytest.raises(LockedError):
        load_bundle(folder)
    assert load_bundle(folder).path == folder
    assert not previous.exists()


def test_list_files_is_what_verify_files_takes(folder: Path) -> None:
    files = list_files(folder, without=MANIFEST)
    assert [file.path for file in files] == NAMES
    verify_files(folder, files)
    verify_files(folder, [])
