"""The side environment: made once, verified, and isolated from the user's own packages."""

from __future__ import annotations

import re
import sys
import threading
from pathlib import Path

import pytest

from edgetune import side_environment
from edgetune.errors import EdgetuneError, MissingDependencyError, ResourceError, UsageError
from edgetune.formats.storage import locked
from edgetune.side_environment import (
    REQUIREMENTS,
    base_interpreter,
    ensure_side_environment,
    find_side_environment,
    run_worker,
    side_environment_version,
    worker_command,
)


def silent(_: str) -> None:
    """Say nothing."""


@pytest.fixture
def real() -> Path:
    """The user's own side environment, made if need be."""
    return ensure_side_environment(silent)


@pytest.fixture
def empty_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("EDGETUNE_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def small_build(empty_cache: Path, monkeypatch: pytest.MonkeyPatch) -> list[list[str]]:
    """Environments without packages: pip and the import check are recorded, not run; `python -m venv` is real."""
    commands: list[list[str]] = []
    really = side_environment._run

    def run(command: list[str], name: str) -> str:
        commands.append(command)
        if "venv" in command:
            return really([*command, "--without-pip"], name)
        return "onnxruntime-training-cpu 1.19.2\n" if str(side_environment._PROBE) in command else ""

    monkeypatch.setattr(side_environment, "_run", run)
    return commands


def script(folder: Path, text: str) -> Path:
    path = folder / "worker.py"
    path.write_text(text)
    return path


def test_every_requirement_is_pinned_and_hashed() -> None:
    text = re.sub(r"#.*\n", "", REQUIREMENTS.read_text()).replace("\\\n", " ")
    lines = text.strip().splitlines()
    assert len(lines) == 5
    for line in lines:
        assert re.fullmatch(r"[a-z-]+==[0-9.]+( +--hash=sha256:[0-9a-f]{64})+", line.strip()), line


def test_it_differentiates_and_trains(real: Path, tmp_path: Path) -> None:
    """A linear layer's loss falls: gradient builder, artifacts and training API are all there, without torch."""
    worker = script(
        tmp_path,
        """
import sys
import numpy as np
from onnx import TensorProto, helper, numpy_helper
from onnxruntime.training import api, artifacts
folder = sys.argv[1]
weight = numpy_helper.from_array(np.ones((4, 3), np.float32), "w")
graph = helper.make_graph(
    [helper.make_node("MatMul", ["x", "w"], ["y"])], "g",
    [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["n", 4])],
    [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["n", 3])], [weight])
model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
artifacts.generate_artifacts(model, requires_grad=["w"], loss=artifacts.LossType.CrossEntropyLoss,
                             optimizer=artifacts.OptimType.AdamW, artifact_directory=folder)
state = api.CheckpointState.load_checkpoint(folder + "/checkpoint")
module = api.Module(folder + "/training_model.onnx", state, folder + "/eval_model.onnx")
optimizer = api.Optimizer(folder + "/optimizer_model.onnx", module)
module.train()
for _ in range(3):
    print("loss", float(module(np.ones((2, 4), np.float32), np.zeros(2, np.int64))))
    optimizer.step()
    module.lazy_reset_grad()
assert not any(name.partition(".")[0] == "torch" for name in sys.modules)
""",
    )
    output = run_worker(worker, [str(tmp_path)])
    losses = [float(line.split()[1]) for line in output.splitlines() if line.startswith("loss")]
    assert losses[0] == pytest.approx(1.0986123, rel=1e-6)  # ln 3
    assert losses == sorted(losses, reverse=True)
    assert len(set(losses)) == 3


def test_workers_see_neither_the_caller_s_packages_nor_variables_nor_neighbours(
    real: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "onnxruntime.py").write_text("raise SystemExit('shadowed')")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.setenv("PYTHONHOME", "/nonexistent")
    monkeypatch.chdir(tmp_path)
    worker = script(
        tmp_path,
        "import importlib.util, onnxruntime, sys\n"
        "print(onnxruntime.__version__, importlib.util.find_spec('pytest'), importlib.util.find_spec('edgetune'))\n"
        "print(*sys.argv[1:], __name__)\n",
    )
    assert run_worker(worker, ["a b", "ä"]) == "1.19.2 None None\na b ä __main__\n"


def test_the_second_call_creates_nothing(small_build: list[list[str]]) -> None:
    said: list[str] = []
    python = ensure_side_environment(said.append)
    count = len(small_build)
    assert count == 3
    assert ensure_side_environment(said.append) == python == find_side_environment()
    assert len(small_build) == count
    assert len(said) == 1
    assert side_environment_version() == "onnxruntime-training-cpu 1.19.2"


def test_pip_installs_only_what_is_hashed(small_build: list[list[str]]) -> None:
    ensure_side_environment(silent)
    (pip,) = (command for command in small_build if "pip" in command)
    assert {"--require-hashes", "--no-deps", "--only-binary"} <= set(pip)
    assert str(REQUIREMENTS) in pip


def test_looking_for_it_creates_nothing(empty_cache: Path) -> None:
    assert find_side_environment() is None
    assert side_environment_version() is None
    assert not empty_cache.exists()
    with pytest.raises(MissingDependencyError, match="edgetune prepare"):
        worker_command(Path("worker.py"), [])


def test_a_failed_build_leaves_nothing(empty_cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    really = side_environment._run

    def run(command: list[str], name: str) -> str:
        if "pip" in command:
            raise EdgetuneError("pip failed (exit 1): ERROR: No matching distribution found for numpy==2.4.6")
        return really([*command, "--without-pip"], name)

    monkeypatch.setattr(side_environment, "_run", run)
    with pytest.raises(MissingDependencyError, match=r"No matching distribution found for numpy.*check the network"):
        ensure_side_environment(silent)
    assert find_side_environment() is None
    assert [path for path in (empty_cache / "side-environment").iterdir() if not path.name.endswith(".lock")] == []


def test_pip_s_own_words_reach_the_person(empty_cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A real pip run against an index that has nothing."""
    (tmp_path / "index").mkdir()
    monkeypatch.setenv("PIP_CONFIG_FILE", "/dev/null")
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path / "index"))
    with pytest.raises(MissingDependencyError, match="No matching distribution found for flatbuffers"):
        ensure_side_environment(silent)
    assert find_side_environment() is None


def test_a_half_made_one_is_made_anew(small_build: list[list[str]]) -> None:
    folder = ensure_side_environment(silent).parent.parent
    (folder / "verified").unlink()
    assert find_side_environment() is None
    ensure_side_environment(silent)
    assert find_side_environment() is not None
    (folder / "bin" / "python").unlink()  # its interpreter was uninstalled
    assert find_side_environment() is None
    ensure_side_environment(silent)
    assert find_side_environment() is not None


def test_another_list_is_another_environment(
    small_build: list[list[str]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = ensure_side_environment(silent)
    changed = tmp_path / "requirements.txt"
    changed.write_text(REQUIREMENTS.read_text() + "# one more\n")
    monkeypatch.setattr(side_environment, "REQUIREMENTS", changed)
    assert find_side_environment() is None
    assert ensure_side_environment(silent) != first


def test_the_second_process_waits_for_the_first(small_build: list[list[str]], empty_cache: Path) -> None:
    """The lock is held elsewhere; when it is let go, the environment is there and nothing is built."""
    said: list[str] = []
    found: list[Path] = []
    python = ensure_side_environment(silent)
    marker = python.parent.parent / "verified"
    content = marker.read_bytes()
    built = len(small_build)
    with locked(python.parent.parent.parent):
        marker.unlink()
        waiter = threading.Thread(target=lambda: found.append(ensure_side_environment(said.append)))
        waiter.start()
        waiter.join(1.5)
        assert waiter.is_alive()
        marker.write_bytes(content)
    waiter.join(20)
    assert found == [python]
    assert len(small_build) == built
    assert len(said) == 1
    assert said[0].startswith("Waiting for another process")


def test_a_cache_folder_that_cannot_be_made_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("EDGETUNE_CACHE", str(tmp_path / "file"))
    with pytest.raises(UsageError, match="EDGETUNE_CACHE"):
        ensure_side_environment(silent)


def test_no_wheel_for_this_platform(empty_cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("platform.system", lambda: "Linux")
    monkeypatch.setattr("platform.machine", lambda: "aarch64")
    with pytest.raises(MissingDependencyError, match=r"no wheel for Linux aarch64.*--runtime onnxruntime"):
        ensure_side_environment(silent)
    assert not empty_cache.exists()


def test_no_interpreter_of_the_right_version(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(side_environment, "_fits", lambda _: False)
    with pytest.raises(MissingDependencyError, match=r"needs CPython 3\.11 .*python3\.11-venv"):
        base_interpreter()


def test_the_interpreter_beneath_the_virtual_environment_is_taken() -> None:
    base = base_interpreter()
    assert sys.prefix != sys.base_prefix, "the tests run in a virtual environment"
    assert Path(sys.prefix) not in base.parents


def test_an_interpreter_that_does_not_run_does_not_fit(tmp_path: Path) -> None:
    shim = tmp_path / "python3.11"
    shim.write_text("#!/bin/sh\necho 'command not found' >&2\nexit 127\n")
    shim.chmod(0o755)
    assert not side_environment._fits(str(shim))
    assert not side_environment._fits(str(tmp_path / "missing"))
    assert side_environment._fits(str(base_interpreter()))


@pytest.mark.parametrize(
    ("text", "error", "message"),
    [
        ("raise ValueError('no gradient for Foo')", EdgetuneError, r"worker.py failed \(exit 1\): ValueError: no grad"),
        ("import os; os._exit(3)", EdgetuneError, r"worker.py failed \(exit 3\): it said nothing"),
        ("import os, signal; os.kill(os.getpid(), signal.SIGKILL)", ResourceError, "not enough memory"),
        ("raise MemoryError", ResourceError, "not enough memory"),
        ("open('/dev/full', 'wb', 0).write(b'x')", ResourceError, r"(?s)No space left on device\nnot enough room"),
    ],
)
def test_a_failing_worker_is_explained(
    real: Path, tmp_path: Path, text: str, error: type[EdgetuneError], message: str
) -> None:
    with pytest.raises(error, match=message):
        run_worker(script(tmp_path, text), [])


def test_the_traceback_is_kept_as_a_note(real: Path, tmp_path: Path) -> None:
    with pytest.raises(EdgetuneError) as caught:
        run_worker(script(tmp_path, "def cause():\n    raise ValueError('x')\ncause()"), [])
    assert "in cause" in caught.value.__notes__[0]
