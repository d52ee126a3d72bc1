"""What is wrong is refused on a device with the exit code of its kind and without a traceback."""

from __future__ import annotations

import json
import os
import shlex
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from edgetune.cli import main
from edgetune.formats.manifest import AdapterManifest
from edgetune.formats.manifest_json import read_manifest, write_manifest
from edgetune.formats.storage import locked
from support.golden import ADAPTER, BUNDLE, GOLDEN, TRAIN, VALID
from support.golden_run import Trained
from support.installed_command import edgetune

FILES = sorted(
    path.relative_to(BUNDLE).as_posix() for path in BUNDLE.rglob("*") if path.is_file() and ".cache" not in path.parts
)
TRAINING = ("--data", TRAIN, "--steps", 1, "--batch-size", 2)


@pytest.fixture
def copy(tmp_path: Path) -> Path:
    return Path(shutil.copytree(BUNDLE, tmp_path / "bundle"))


def flip(path: Path, place: float) -> None:
    data = bytearray(path.read_bytes())
    data[int(place * (len(data) - 1))] ^= 0x04
    path.write_bytes(data)


def test_there_are_all_the_files_to_flip() -> None:
    assert len(FILES) == 38
    assert {"manifest.json", "checkpoint", "step.onnx", "model.onnx.data", "tokenizer.json"} <= set(FILES)


@pytest.mark.parametrize("place", [0.0, 0.37, 0.5, 1.0])
@pytest.mark.parametrize("file", FILES)
def test_a_flipped_byte_is_found(copy: Path, file: str, place: float) -> None:
    """In this process, for speed; the command itself comes below."""
    flip(copy / file, place)
    for verb in (["inspect"], ["generate", "--prompt", "Hello."], ["eval", "--data", str(VALID)]):
        done = CliRunner().invoke(main, [verb[0], str(copy), *verb[1:]])
        assert done.exit_code == 5, done.output
        assert file in done.output
        assert "internal error" not in done.output


@pytest.mark.parametrize("verb", ["train", "eval", "preview", "generate", "inspect", "export", "ship"])
def test_every_command_refuses_a_changed_bundle(copy: Path, tmp_path: Path, trained: Trained, verb: str) -> None:
    flip(copy / "model.onnx.data", 0.5)
    adapter = trained.result.path
    options: dict[str, tuple[object, ...]] = {
        "train": (*TRAINING, "--output", tmp_path / "out"),
        "eval": ("--data", VALID, "--adapter", adapter),
        "preview": ("--data", VALID),
        "generate": ("--prompt", "Hello."),
        "inspect": (),
        "export": ("--adapter", adapter, "--output", tmp_path / "out"),
        "ship": ("--target", "web", "--output", tmp_path / "out"),
    }
    said = edgetune(verb, copy, *options[verb])
    assert said.code == 5, said
    assert "model.onnx.data was changed" in said.err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("how", ["missing", "cut off", "longer", "a link", "a folder"])
def test_a_file_that_is_not_itself_is_found(copy: Path, tmp_path: Path, how: str) -> None:
    file = copy / "step.onnx"
    data = file.read_bytes()
    file.unlink()
    if how == "cut off":
        file.write_bytes(data[:-1])
    elif how == "longer":
        file.write_bytes(data + b"\0")
    elif how == "a link":
        (tmp_path / "elsewhere.onnx").write_bytes(data)
        file.symlink_to(tmp_path / "elsewhere.onnx")
    elif how == "a folder":
        file.mkdir()
    said = edgetune("train", copy, *TRAINING, "--output", tmp_path / "out")
    assert said.code == 5, said
    assert "step.onnx" in said.err
    assert not (tmp_path / "out").exists()


def test_a_flipped_byte_in_an_adapter_is_found(tmp_path: Path, trained: Trained) -> None:
    for file in ("adapter_model.safetensors", "adapter_config.json", "metrics.jsonl", "edgetune.json"):
        adapter = Path(shutil.copytree(trained.result.path, tmp_path / file))
        flip(adapter / file, 0.5)
        said = edgetune("eval", BUNDLE, "--data", VALID, "--adapter", adapter)
        assert said.code == 5, said
        assert file in said.err


def rebase(adapter: Path, sha256: str) -> None:
    """Sign the adapter over to another base."""
    path = adapter / "edgetune.json"
    manifest = read_manifest(path.read_bytes(), AdapterManifest, str(path))
    base = replace(manifest.base, name="another-model", sha256=sha256)
    path.write_bytes(write_manifest(replace(manifest, base=base)))


def test_an_adapter_of_another_base_does_not_fit(tmp_path: Path, trained: Trained) -> None:
    adapter = Path(shutil.copytree(trained.result.path, tmp_path / "adapter"))
    rebase(adapter, "0" * 64)
    output = tmp_path / "out"
    for arguments in (
        ("eval", BUNDLE, "--data", VALID, "--adapter", adapter),
        ("train", BUNDLE, *TRAINING, "--init-adapter", adapter, "--output", output),
        ("export", BUNDLE, "--adapter", adapter, "--output", output),
    ):
        said = edgetune(*arguments)
        assert said.code == 4, said
        assert "another-model" in said.err
        assert "edgetune-golden-base" in said.err
        assert not output.exists()


def test_an_adapter_of_another_rank_does_not_fit(tmp_path: Path) -> None:
    adapter = Path(shutil.copytree(ADAPTER, tmp_path / "adapter"))
    config: dict[str, Any] = json.loads((adapter / "adapter_config.json").read_text())
    (adapter / "adapter_config.json").write_text(json.dumps(config | {"r": 8}))
    said = edgetune("eval", BUNDLE, "--data", VALID, "--adapter", adapter)
    assert said.code == 4, said
    assert "r is 8, the bundle's is 4" in said.err


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        ('{"messages": [', "JSON"),
        ('{"massages": []}', "massages"),
        ('{"messages": [{"role": "user", "content": "Hello."}]}', "assistant"),
        ('{"prompt": "Hello?", "completion": " Hello."}', "one kind a file"),
        ("[1, 2]", "object"),
        ("\ufeff{}", "BOM"),
    ],
)
def test_broken_rows_are_named_by_their_place(tmp_path: Path, line: str, reason: str) -> None:
    data = tmp_path / "rows.jsonl"
    good = TRAIN.read_text(encoding="utf-8").splitlines()[:2]
    data.write_text("\n".join([*good, line, *good]) + "\n", encoding="utf-8")
    for arguments in (
        ("train", BUNDLE, "--data", data, "--output", tmp_path / "out"),
        ("train", BUNDLE, "--data", TRAIN, "--valid", data, "--output", tmp_path / "out"),
        ("eval", BUNDLE, "--data", data),
        ("preview", BUNDLE, "--data", data),
    ):
        said = edgetune(*arguments)
        assert said.code == 3, said
        assert f"{data}:3: " in said.err
        assert reason in said.err
        assert not (tmp_path / "out").exists()


def test_rows_that_are_no_text_are_refused(tmp_path: Path) -> None:
    data = tmp_path / "rows.jsonl"
    for content in (b"", b"\n\n", b'{"text": "\xff"}\n', '{"text": "hi"}\n'.encode("utf-16"), b'{"text": "a\0"}\n'):
        data.write_bytes(content)
        said = edgetune("train", BUNDLE, "--data", data, "--output", tmp_path / "out")
        assert said.code == 3, (content, said)
        assert str(data) in said.err


def test_what_is_missing_is_a_usage_error(tmp_path: Path, trained: Trained) -> None:
    missing, output = tmp_path / "missing", tmp_path / "out"
    for arguments in (
        ("train", BUNDLE, "--data", missing, "--output", output),
        ("train", BUNDLE, "--data", TRAIN, "--valid", missing, "--output", output),
        ("train", missing, "--data", TRAIN, "--output", output),
        ("train", BUNDLE, *TRAINING, "--init-adapter", missing, "--output", output),
        ("eval", BUNDLE, "--data", missing),
        ("eval", BUNDLE, "--data", VALID, "--adapter", missing),
        ("preview", missing, "--data", VALID),
        ("generate", missing, "--prompt", "Hello."),
        ("export", missing, "--adapter", trained.result.path, "--output", output),
        ("inspect", missing),
    ):
        said = edgetune(*arguments)
        assert said.code == 2, said
        assert str(missing) in said.err
        assert not output.exists()


@pytest.mark.parametrize(
    ("arguments", "suggestion"),
    [
        (("train", BUNDLE, "--data", TRAIN, "--output", "out", "--learning-rat", "1e-3"), "--learning-rate"),
        (("train", BUNDLE, "--data", TRAIN, "--outputs", "out"), "--output"),
        (("eval", BUNDLE, "--dta", VALID), "--data"),
        (("generate", BUNDLE, "--promt", "Hello."), "--prompt"),
        (("trian", BUNDLE), "train"),
    ],
)
def test_a_misspelt_word_gets_a_suggestion(arguments: tuple[object, ...], suggestion: str) -> None:
    said = edgetune(*arguments)
    assert said.code == 2, said
    assert "did you mean" in said.err.lower()
    assert suggestion in said.err


def test_a_locked_output_names_who_holds_it(tmp_path: Path) -> None:
    output = tmp_path / "out"
    with locked(output):
        said = edgetune("train", BUNDLE, *TRAINING, "--output", output)
    assert said.code == 7, said
    assert f"PID {os.getpid()}" in said.err
    assert not output.exists()
    assert edgetune("train", BUNDLE, *TRAINING, "--output", output).code == 0
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out"]


def test_an_output_that_is_there_stays(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "precious").write_text("mine")
    for force in ([], ["--force"]):
        said = edgetune("train", BUNDLE, *TRAINING, "--output", tmp_path / "out", *force)
        assert said.code == 2, said
        assert (tmp_path / "out" / "precious").read_text() == "mine"


def test_a_device_lays_out_a_shipped_folder_without_the_host(tmp_path: Path, trained: Trained) -> None:
    arguments = ("--target", "android", "--output", tmp_path / "out", "--adapter", trained.result.path, "--json")
    said = edgetune("ship", BUNDLE, *arguments)
    assert said.code == 0, said
    assert json.loads(said.out)["sizes"]["weights"] > 200_000
    assert (tmp_path / "out" / "edgetune_model" / "src" / "main" / "assets" / "target.json").is_file()


@pytest.mark.parametrize("form", ["--merge", "--keep-adapter"])
def test_export_says_what_the_host_needs(tmp_path: Path, trained: Trained, form: str) -> None:
    said = edgetune("export", BUNDLE, "--adapter", trained.result.path, "--output", tmp_path / "model", form)
    assert said.code == 1, said
    assert 'pip install "edgetune[host]"' in said.err
    assert list(tmp_path.iterdir()) == []


def test_prepare_says_what_the_host_needs(tmp_path: Path) -> None:
    checkpoint = GOLDEN / "edgetune-golden-base"
    said = edgetune("prepare", checkpoint, "--output", tmp_path / "bundle", "--max-length", 64)
    assert said.code == 1, said
    assert 'pip install "edgetune[host]"' in said.err
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("closed", [">&-", "2>&-", "<&-"])
def test_a_closed_stream_loses_nothing(tmp_path: Path, closed: str) -> None:
    words = ["train", BUNDLE, "--data", TRAIN, "--output", "adapter", "--steps", "1", "--batch-size", "2"]
    line = shlex.join([sys.executable, "-m", "edgetune", *map(str, words)])
    done = subprocess.run(["sh", "-c", f"{line} {closed}"], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "adapter" / "edgetune.json").is_file()


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="the system has no /dev/full")
@pytest.mark.parametrize("option", [[], ["--json"]])
def test_a_full_disk_behind_stdout_is_said_once(option: list[str]) -> None:
    with Path("/dev/full").open("w") as full:
        command = [sys.executable, "-m", "edgetune", "inspect", str(BUNDLE), *option]
        done = subprocess.run(command, stdout=full, stderr=subprocess.PIPE, text=True)
    assert done.returncode == 6
    assert done.stderr == (
        "error: not enough room on a disk; free some space, or choose another output (No space left on device)\n"
    )
