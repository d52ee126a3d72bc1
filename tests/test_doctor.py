"""What doctor finds: missing packages, wrong versions, clashes, and nothing imported on the way."""

from __future__ import annotations

import subprocess
import sys
from importlib import metadata
from pathlib import Path

import pytest

from edgetune import doctor
from edgetune.doctor import Finding, examine
from edgetune.errors import MissingDependencyError


def named(findings: list[Finding], name: str, group: str) -> Finding:
    (finding,) = (finding for finding in findings if (finding.name, finding.group) == (name, group))
    return finding


def test_a_complete_installation_has_nothing_to_fix() -> None:
    findings = examine()
    packages = [finding for finding in findings if finding.group in ("device", "host")]
    assert {finding.name for finding in packages} > {"onnxruntime", "numpy", "torch", "olive-ai"}
    assert [finding for finding in packages if not finding.ok or finding.fix] == []
    assert [finding.found for finding in packages] == [metadata.version(finding.name) for finding in packages]


def test_the_groups_come_in_order_and_test_tools_are_left_out() -> None:
    findings = examine()
    groups = list(dict.fromkeys(finding.group for finding in findings))
    assert groups == ["device", "host", "extras", "side environment", "machine"]
    assert "pytest" not in {finding.name for finding in findings}


def test_a_device_without_the_host_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    version = metadata.version

    def without_torch(name: str) -> str:
        if name == "torch":
            raise metadata.PackageNotFoundError(name)
        return "0.18.0" if name == "onnxruntime-genai" else version(name)

    monkeypatch.setattr(metadata, "version", without_torch)
    findings = examine()
    torch = named(findings, "torch", "host")
    assert (torch.found, torch.ok, torch.wanted) == (None, False, "==2.13.*")
    assert torch.fix == 'pip install "edgetune[host]"'
    assert named(findings, "onnxruntime-genai", "device").ok
    genai = named(findings, "onnxruntime-genai", "host")
    assert (genai.found, genai.ok, genai.wanted) == ("0.18.0", False, "==0.14.1")


@pytest.mark.parametrize(("found", "ok"), [(None, True), ("2020.1", False), ("2026.4.0", True)])
def test_an_extra_may_be_absent_but_not_wrong(monkeypatch: pytest.MonkeyPatch, found: str | None, ok: bool) -> None:
    version = metadata.version

    def fake(name: str) -> str:
        if name != "openvino":
            return version(name)
        if found is None:
            raise metadata.PackageNotFoundError(name)
        return found

    monkeypatch.setattr(metadata, "version", fake)
    openvino = named(examine(), "openvino", "extras")
    assert (openvino.found, openvino.ok) == (found, ok)
    assert (openvino.fix is None) == (found == "2026.4.0")
    assert openvino.fix is None or openvino.fix.startswith('pip install "edgetune[openvino]"')


def test_a_wrong_version_names_the_range_and_the_fix(monkeypatch: pytest.MonkeyPatch) -> None:
    version = metadata.version
    monkeypatch.setattr(metadata, "version", lambda name: "1.0.0" if name == "numpy" else version(name))
    numpy = named(examine(), "numpy", "device")
    assert (numpy.found, numpy.ok, numpy.wanted) == ("1.0.0", False, ">=2.1,<3")
    assert numpy.fix == 'pip install "numpy<3,>=2.1"'


def test_two_packages_that_install_onnxruntime_clash(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        metadata, "packages_distributions", lambda: {"onnxruntime": ["onnxruntime", "onnxruntime-training-cpu"]}
    )
    clash = named(examine(), "import onnxruntime", "device")
    assert not clash.ok
    assert clash.fix is not None
    assert "pip uninstall onnxruntime onnxruntime-training-cpu" in clash.fix


def test_the_side_environment_before_its_first_use(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("EDGETUNE_CACHE", str(tmp_path))
    side = named(examine(), "onnxruntime-training-cpu", "side environment")
    assert (side.found, side.wanted, side.ok) == (None, "==1.19.2", False)
    assert side.fix is not None
    assert "edgetune prepare" in side.fix
    assert list(tmp_path.iterdir()) == []
    monkeypatch.setattr("platform.machine", lambda: "riscv64")
    side = named(examine(), "onnxruntime-training-cpu", "side environment")
    assert side.fix is not None
    assert "no wheel for" in side.fix


def test_facts_of_the_machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    facts = {finding.name: finding for finding in examine() if finding.group == "machine"}
    assert all(fact.ok and fact.fix is None for fact in facts.values())
    assert (facts["Python"].found or "").endswith(sys.version.split()[0])
    assert int(facts["cores"].found or 0) >= 1
    assert str(tmp_path) in (facts["disk, this folder"].found or "")


def test_the_memory_that_is_available_is_what_a_container_has(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("edgetune.machine.control_group.left_bytes", lambda: 200_000_000)
    memory = named(examine(), "memory", "machine")
    assert (memory.found or "").endswith(" GB, 0.2 GB available")


def test_proc_files_are_read_and_may_be_absent(tmp_path: Path) -> None:
    path = tmp_path / "cpuinfo"
    path.write_text("processor\t: 0\nmodel name\t: A\n\nprocessor\t: 1\nmodel name\t: B\n")
    assert doctor._fields(path) == {"processor": "0", "model name": "A", "": ""}
    assert doctor._fields(tmp_path / "missing") == {}


def test_running_from_sources_that_are_not_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "_PACKAGE", "edgetune-that-is-not-installed")
    with pytest.raises(MissingDependencyError, match=r"pip install -e \."):
        examine()


def test_nothing_heavy_is_imported() -> None:
    code = (
        "import sys; from edgetune.doctor import examine; examine();"
        "print(sorted({name.partition('.')[0] for name in sys.modules}"
        " & {'onnxruntime', 'onnxruntime_genai', 'numpy', 'tokenizers', 'torch', 'transformers', 'olive', 'onnx'}))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
