"""Device profiles: edgetune's own, and named valid and invalid ones."""

from __future__ import annotations

import os
import re
from dataclasses import fields
from pathlib import Path

import pytest
from click.testing import CliRunner

from edgetune.cli import main
from edgetune.devices.profile import (
    Buckets,
    Execution,
    Hardware,
    Install,
    Limits,
    Placement,
    load_profile,
    load_profiles,
    profile_names,
)
from edgetune.errors import UsageError
from edgetune.runtimes import RUNTIMES
from support.device_profile import PROFILE
from support.repository import ROOT

LEAST = {
    *("generic-x86", "generic-arm64", "raspberry-pi-5", "jetson-orin-nano", "android-snapdragon-8-elite"),
    *("windows-snapdragon-x", "intel-core-ultra", "amd-ryzen-ai", "amd-kria-kv260", "amd-versal-vek280"),
    "apple-silicon",
}

INVALID: dict[str, tuple[str, str, int, str]] = {
    "unknown key": ("vendor =", "vender =", 4, "unknown key 'vender'; did you mean 'vendor'?"),
    "unknown key in a table": ("provider =", "providers =", 14, "unknown key 'runtime.providers'"),
    "unknown key in a figure": ("cores = { value", "cores = { worth", 9, "unknown key 'hardware.cores.worth'"),
    "unknown table": ("[install]", "[instal]", 35, "unknown key 'instal'; did you mean 'install'?"),
    "missing table": ("[buckets]\nshapes = [[1, 64], [1, 128]]", "[buckets]", 27, "'buckets.shapes' is missing"),
    "missing source": (
        'cores = { value = 4, source = "data sheet" }',
        "cores = { value = 4 }",
        9,
        "'hardware.cores.source'",
    ),
    "empty source": ('value = 4, source = "data sheet"', 'value = 4, source = " "', 9, "not an empty one"),
    "a number for a figure": ('cores = { value = 4, source = "data sheet" }', "cores = 4", 9, "expected a table"),
    "bad size": ('"2GB"', '"2 big"', 10, "hardware.memory.value is '2 big', expected a size in quotes, such as '8GB'"),
    "size without quotes": ('"2GB"', "2000000000", 10, "expected a size in quotes"),
    "no cores": ("value = 4", "value = 0", 9, "expected a whole number above 0"),
    "half a core": ("value = 4", "value = 4.5", 9, "expected a whole number above 0"),
    "a core that is true": ("value = 4", "value = true", 9, "expected a whole number above 0"),
    "wrong class": ('class = "npu"', 'class = "gpu"', 3, "class is 'gpu', expected 'cpu' or 'npu' or 'fpga'"),
    "wrong type": ('title = "My board"', "title = 7", 2, "title is 7, expected a text in quotes"),
    "text for a list": ('systems = ["linux"]', 'systems = "linux"', 8, "expected a list"),
    "wrong member": ('systems = ["linux"]', 'systems = ["linux", "plan9"]', 8, "hardware.systems.[1] is 'plan9'"),
    "wrong option": ('backend_type = "htp"', "backend_type = 1", 15, "expected a table of texts in quotes"),
    "short bucket": ("[1, 64], [1, 128]", "[1], [1, 128]", 28, "expected a list of 2"),
    "unordered buckets": ("[1, 64], [1, 128]", "[1, 128], [1, 64]", 28, "the smallest product first"),
    "a bucket twice": ("[1, 64], [1, 128]", "[1, 64], [1, 64]", 28, "once"),
    "bad name": ('name = "my-board"', 'name = "My Board"', 1, "expected lower-case letters"),
    "cpu with an accelerator": ('class = "npu"', 'class = "cpu"', 20, "a device of class cpu has none"),
    "bad expression": (
        'memory = { value = "2GB"',
        'known-as = { text = "(", source = "x" }\nmemory = { value = "2GB"',
        10,
        "no regular expression",
    ),
    "no system": ('systems = ["linux"]', "systems = []", 8, "systems is empty"),
    "no runtime": ('names = ["qnn", "onnxruntime"]', "names = []", 13, "names is empty, expected one of openvino"),
    "no known runtime": ('["qnn", "onnxruntime"]', '["tensorflow"]', 13, "names is 'tensorflow', expected one of"),
    "misspelt runtime": ('"onnxruntime"]', '"onnxruntme"]', 13, "'onnxruntme'; did you mean 'onnxruntime'?"),
    "misspelt option": ("backend_type", "soc_modell", 15, "options has 'soc_modell'; did you mean 'soc_model'?"),
    "no chip": ('backend_type = "htp"', 'soc_model = "banana"', 15, "soc_model is 'banana', expected a number"),
    "no device": ('backend_type = "htp"', 'device_type = "TPU"', 15, "device_type is 'TPU', expected CPU, GPU, NPU"),
    "no TOML": ('vendor = "Somebody"', "vendor = Somebody", 4, "Invalid value"),
}
"""What is replaced by what, and the line and a part of the message."""


@pytest.fixture
def board(tmp_path: Path) -> Path:
    path = tmp_path / "my-board.toml"
    path.write_text(PROFILE)
    return path


@pytest.mark.parametrize("command", [("devices", "check"), ("train", "x", "--data", "y", "--output", "z", "--config")])
def test_what_is_no_file_is_not_read(command: tuple[str, ...], tmp_path: Path) -> None:
    pipe, endless = tmp_path / "pipe.toml", tmp_path / "endless.toml"
    os.mkfifo(pipe)
    endless.symlink_to("/dev/zero")
    for path in (pipe, endless):
        done = CliRunner().invoke(main, [*command, str(path)])
        assert done.exit_code == 2 and "is not a regular file; expected a TOML file" in done.stderr


def test_a_device_on_which_nothing_runs_is_none(board: Path) -> None:
    board.write_text(re.sub('"(accelerator|cpu)"', '"no"', PROFILE).replace('class = "npu"', 'class = "cpu"'))
    with pytest.raises(UsageError, match="nothing runs anywhere"):
        load_profile(str(board))


def test_edgetunes_profiles_are_right() -> None:
    profiles = {profile.name: profile for profile in load_profiles()}
    assert LEAST <= set(profiles) == set(profile_names())
    assert {profile.kind for profile in profiles.values()} == {"cpu", "npu", "fpga"}
    for profile in profiles.values():
        assert set(profile.runtime.names) <= {*RUNTIMES, "qnn"}
        assert "onnxruntime" in profile.runtime.names
        assert profile.install.step
        assert load_profile(profile.name) == profile


def test_a_source_names_an_address_or_a_document() -> None:
    """Every `docs/…` that a profile names is there."""
    root = ROOT
    text = "".join(path.read_text() for path in (root / "devices").glob("*.toml"))
    documents = set(re.findall(r'"(?:docs/[a-z]+\.md|README\.md)', text))
    assert len(documents) >= 3
    assert all((root / document.strip('"')).is_file() for document in documents)


def test_a_valid_profile_says_what_the_file_says(board: Path) -> None:
    profile = load_profile(str(board))
    assert (profile.name, profile.kind, profile.runtime.names) == ("my-board", "npu", ("qnn", "onnxruntime"))
    assert profile.hardware.memory is not None and profile.hardware.memory.value == 2_000_000_000
    assert profile.hardware.flash is None
    assert profile.buckets is not None and profile.buckets.shapes == ((1, 64), (1, 128))
    assert profile.runtime.options == {"backend_type": "htp"}
    assert [note.text for note in profile.limits.notes] == ["static shapes only"]


@pytest.mark.parametrize("wrong", INVALID)
def test_an_invalid_profile_is_refused_with_its_line(board: Path, wrong: str) -> None:
    old, new, line, message = INVALID[wrong]
    assert PROFILE.count(old) == 1
    board.write_text(PROFILE.replace(old, new))
    with pytest.raises(UsageError) as caught:
        load_profile(str(board))
    found = [problem for problem in str(caught.value).splitlines() if message in problem]
    assert found, caught.value
    assert found[0].startswith(f"{board}:{line}: ")


def test_all_problems_are_said_at_once(board: Path) -> None:
    text = PROFILE
    for wrong in ("unknown key", "bad size", "no cores", "wrong member", "short bucket"):
        text = text.replace(*INVALID[wrong][:2])
    board.write_text(text)
    with pytest.raises(UsageError) as caught:
        load_profile(str(board))
    lines = [int(found) for found in re.findall(r"\.toml:(\d+): ", str(caught.value))]
    assert {4, 8, 9, 10, 28} <= set(lines)


def test_profiles_of_one_folder_have_different_names(tmp_path: Path) -> None:
    for name in ("my-board", "other-board"):
        (tmp_path / f"{name}.toml").write_text(PROFILE)
    with pytest.raises(UsageError, match=r"other-board\.toml:1: name is 'my-board', but the file is other-board\.toml"):
        load_profiles(tmp_path)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("raspbery-pi-5", "did you mean 'raspberry-pi-5'"),
        ("./nowhere.toml", "no such file"),
        ("nothing", "edgetune devices list"),
        ("/", "is a folder"),
    ],
)
def test_what_is_not_there_is_said(name: str, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        load_profile(name)


@pytest.mark.parametrize("table", [Hardware, Execution, Placement, Limits, Buckets, Install])
def test_every_key_of_a_profile_is_documented(table: type) -> None:
    page = (ROOT / "docs" / "devices.md").read_text(encoding="utf-8")
    keys = [field.name.replace("_", "-") for field in fields(table)]
    assert [key for key in keys if not re.search(rf"[`.]{key}`", page)] == []
