"""`edgetune devices`: what is listed, shown and checked, on this machine and on others."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from click.testing import CliRunner, Result

from edgetune.cli import main
from edgetune.devices import presence as device_check
from edgetune.devices.presence import Machine, check, this_machine
from edgetune.devices.profile import load_profile, load_profiles
from edgetune.runtimes import openvino
from support.device_profile import PROFILE

PI = Machine("aarch64", "linux", ("Raspberry Pi 5 Model B Rev 1.0",))
MACHINES: dict[str, Machine] = {
    "raspberry-pi-5": PI,
    "jetson-orin-nano": Machine("aarch64", "linux", ("NVIDIA Jetson Orin Nano Developer Kit",)),
    "android-snapdragon-8-elite": Machine("aarch64", "android", ("Qualcomm Technologies, Inc SM8750",)),
    "windows-snapdragon-x": Machine(
        "aarch64", "windows", ("Snapdragon(R) X Elite - X1E80100 - Qualcomm(R) Oryon(TM)",)
    ),
    "intel-core-ultra": Machine("x86_64", "linux", ("Intel(R) Core(TM) Ultra 7 155H",)),
    "amd-ryzen-ai": Machine("x86_64", "windows", ("AMD Ryzen AI 9 HX 370 w/ Radeon 890M",)),
    "amd-kria-kv260": Machine("aarch64", "linux", ("ZynqMP SMK-K26 Rev1/B/A",)),
    "amd-versal-vek280": Machine("aarch64", "linux", ("Xilinx Versal vek280 Eval board revA",)),
    "apple-silicon": Machine("aarch64", "macos", ("arm",)),
    "generic-x86": Machine("x86_64", "linux", ("Some Xeon",)),
    "generic-arm64": Machine("aarch64", "linux", ("Some board",)),
}
"""What each device says of itself."""


def run(*arguments: str) -> Result:
    return CliRunner().invoke(main, ["devices", *arguments])


def answer(*arguments: str) -> Any:
    done = run(*arguments, "--json")
    assert done.exit_code == 0, done.output
    return json.loads(done.stdout)


@pytest.mark.parametrize("name", [profile.name for profile in load_profiles()])
def test_each_device_is_recognised_and_nothing_else(name: str) -> None:
    profile = load_profile(name)
    assert check(profile, MACHINES[name]).here
    strangers = [other for other, machine in MACHINES.items() if check(profile, machine).here and other != name]
    if profile.hardware.known_as is not None:
        assert strangers == []
    assert all(MACHINES[other].architecture == profile.hardware.architecture for other in strangers)


@pytest.mark.parametrize(("installed", "missing"), [(False, ["onnxruntime-qnn"]), (True, [])])
def test_what_is_not_here_names_its_install_step(
    monkeypatch: pytest.MonkeyPatch, installed: bool, missing: list[str]
) -> None:
    # A plugin that another test registered stays in the process.
    monkeypatch.setattr("onnxruntime.get_available_providers", lambda: ["CPUExecutionProvider"])
    monkeypatch.setattr(device_check, "_installed", lambda name: installed)
    found = check(load_profile("windows-snapdragon-x"), PI)
    assert not found.here
    assert "linux" in found.why
    assert (found.packages_missing, found.provider_found) == (missing, installed)
    assert found.install == "pip install onnxruntime-qnn"


def test_hardware_without_its_packages_is_told_how_to_get_them(monkeypatch: pytest.MonkeyPatch) -> None:
    profile = load_profile("windows-snapdragon-x")
    machine = MACHINES["windows-snapdragon-x"]
    # A plugin that another test registered stays in the process.
    monkeypatch.setattr("onnxruntime.get_available_providers", lambda: ["CPUExecutionProvider"])
    monkeypatch.setattr(device_check, "_installed", lambda name: False)
    absent = check(profile, machine)
    assert absent.here and not absent.provider_found and absent.install
    monkeypatch.setattr(device_check, "_installed", lambda name: True)
    there = check(profile, machine)
    assert there.provider_found and there.packages_missing == [] and there.install is None


def test_one_of_several_devices_of_openvino_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    """OpenVINO numbers them."""
    npu = load_profile("intel-core-ultra")
    gpu = replace(npu, runtime=replace(npu.runtime, options={"device_type": "GPU"}))
    monkeypatch.setattr(device_check, "_installed", lambda name: True)
    monkeypatch.setattr(openvino, "core", lambda: SimpleNamespace(available_devices=["CPU", "GPU.0", "GPU.1"]))
    assert check(gpu).provider_found
    assert not check(npu).provider_found


def test_this_machine_has_a_generic_profile() -> None:
    generic = {"x86_64": "generic-x86", "aarch64": "generic-arm64"}
    found = check(load_profile(generic[this_machine().architecture]))
    assert found.here and found.provider_found and found.install is None


def test_check_looks_at_every_profile_and_ends_well() -> None:
    found = answer("check")
    assert [each["name"] for each in found] == [profile.name for profile in load_profiles()]
    assert sum(each["here"] for each in found) >= 1
    for each in found:
        assert each["why"]
        assert each["install"] or (each["here"] and each["provider_found"])
    shown = run("check")
    assert shown.exit_code == 0
    for each in found:
        assert each["name"] in shown.output
        assert each["install"] is None or each["install"] in shown.output


def test_a_broken_profile_is_an_error(tmp_path: Path) -> None:
    board = tmp_path / "my-board.toml"
    board.write_text(PROFILE)
    assert run("check", str(board)).exit_code == 0
    board.write_text(PROFILE.replace("vendor =", "vender ="))
    done = run("check", str(board))
    assert done.exit_code == 2
    assert f"{board}:4: unknown key 'vender'" in done.output


def test_list_and_show_say_what_the_profiles_say() -> None:
    listed = answer("list")
    assert {each["name"] for each in listed} == {profile.name for profile in load_profiles()}
    assert {each["class"] for each in listed} == {"cpu", "npu", "fpga"}
    table = run("list").output
    assert all(each["name"] in table for each in listed)
    pi = answer("show", "raspberry-pi-5")
    assert pi == next(each for each in listed if each["name"] == "raspberry-pi-5")
    shown = run("show", "raspberry-pi-5").output
    assert "8.0 GB" in shown
    assert all(figure["source"] in shown for figure in pi["hardware"].values() if isinstance(figure, dict))
    fixed = run("show", "intel-core-ultra").output
    assert "buckets\n  shapes: 1 × 64, 1 × 128, 1 × 256, 4 × 128, 4 × 256\n  source: docs/devices.md" in fixed
    assert "None" not in fixed


def test_a_misspelt_name_or_command_is_answered() -> None:
    assert "did you mean 'raspberry-pi-5'" in run("show", "raspbery-pi-5").output
    assert run("chekc").exit_code == 2
