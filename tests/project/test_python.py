"""What Python imports from `edgetune`: the page about it, one order of arguments, and nothing heavy before its use."""

from __future__ import annotations

import ast
import inspect
import os
import re
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from importlib import import_module
from pathlib import Path
from threading import Thread
from typing import Any

import pytest

import edgetune
from edgetune import (
    Bundle,
    EdgetuneError,
    EvaluateConfig,
    ExportConfig,
    GenerateConfig,
    Observer,
    StepMetrics,
    TrainConfig,
    UsageError,
    VerificationError,
    errors,
    evaluate,
    evaluate_answers,
    export,
    generate,
    import_adapter,
    load_bundle,
    prepare,
    train,
)
from edgetune.preview import preview
from edgetune.split import split
from support.bundle_copy import copy_of_bundle
from support.golden import BUNDLE, VALID
from support.golden import TRAIN as ROWS
from support.prepared_bundles import Prepared
from support.repository import ROOT
from support.tiny_phi3 import save_adapter

CONFIG = TrainConfig(runtime="onnxruntime", steps=3, learning_rate=1e-2)
ENVIRONMENT = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), *filter(None, sys.path)])}
NEAR = 0.25
"""Relative difference of a figure on the page from what another machine measures: it rounds otherwise at each step."""

_SCRIPT = re.compile(r"^```python\n(.*?)^```\n(?:\n```\n\$ python (\w+\.py)\n(.*?)^```\n)?", re.MULTILINE | re.DOTALL)
_FIGURE = re.compile(r"\d+(?:\.\d+)?")


# --- the page


@dataclass(frozen=True)
class Script:
    """A block of code on the page."""

    name: str
    code: str
    output: str
    """As the page shows it; empty where it shows none. A last line `…` stands for all that follows."""


SCRIPTS = [
    Script(name or f"block_{number}.py", code, output)
    for number, (code, name, output) in enumerate(
        _SCRIPT.findall((ROOT / "docs" / "python.md").read_text(encoding="utf-8"))
    )
]


def test_the_page_shows_what_comes_out_of_most_of_its_scripts() -> None:
    assert [script.name for script in SCRIPTS if script.output] == ["learn.py", "whole.py", "mend.py"]
    assert len(SCRIPTS) == 4


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda script: script.name)
def test_a_script_of_the_page_does_what_the_page_says(script: Script, tmp_path: Path) -> None:
    """As it stands, in a process of its own, where `artifacts` lies as in a checkout."""
    (tmp_path / "artifacts").symlink_to(ROOT / "artifacts", target_is_directory=True)
    (tmp_path / script.name).write_text(script.code, encoding="utf-8")
    command = [sys.executable, script.name]
    done = subprocess.run(command, cwd=tmp_path, env=ENVIRONMENT, capture_output=True, text=True, encoding="utf-8")
    assert done.returncode == 0, done.stderr
    said, shown = done.stdout.splitlines(), script.output.splitlines()
    if shown[-1:] == ["…"]:
        shown.pop()
        said = said[: len(shown)]
    if script.output:
        assert [_FIGURE.sub("#", line) for line in said] == [_FIGURE.sub("#", line) for line in shown]
        figures = [[float(figure) for line in lines for figure in _FIGURE.findall(line)] for lines in (said, shown)]
        assert figures[0] == pytest.approx(figures[1], rel=NEAR)


# --- what is offered


def test_importing_the_package_imports_nothing_else() -> None:
    """Names can be listed, and configurations made, without anything that takes long to import."""
    code = """
import sys
known = set(sys.modules)
import edgetune
dir(edgetune)
print(*sorted({name for name in sys.modules if name.startswith("edgetune")}))
edgetune.TrainConfig(steps=1), edgetune.UsageError
print(*sorted({name.partition(".")[0] for name in set(sys.modules) - known} - sys.stdlib_module_names))
"""
    done = subprocess.run([sys.executable, "-c", code], env=ENVIRONMENT, capture_output=True, text=True, check=True)
    assert done.stdout.splitlines() == ["edgetune", "edgetune"]


def static_names() -> dict[str, str]:
    """What type checkers read: name → module."""
    tree = ast.parse(Path(edgetune.__file__).read_text(encoding="utf-8"))
    [block] = [node for node in tree.body if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"]
    imports = [node for node in block.body if isinstance(node, ast.ImportFrom)]
    assert len(imports) == len(block.body)
    return {alias.asname or "": str(node.module) for node in imports for alias in node.names}


def test_type_checkers_see_what_is_there() -> None:
    static = static_names()
    assert sorted(["__version__", *static]) == sorted(edgetune.__all__)
    for name, module in static.items():
        assert getattr(edgetune, name) is getattr(import_module(module), name)
    assert set(edgetune.__all__) <= set(dir(edgetune))


def test_every_error_is_offered() -> None:
    kinds = {
        name for name, value in vars(errors).items() if inspect.isclass(value) and issubclass(value, EdgetuneError)
    }
    assert kinds and kinds <= set(edgetune.__all__)


def test_an_unknown_name_is_refused_as_by_any_module() -> None:
    with pytest.raises(AttributeError, match="module 'edgetune' has no attribute 'tran'"):
        edgetune.tran  # noqa: B018 - looking it up is the test
    assert not hasattr(edgetune, "__wrapped__")
    with pytest.raises(ImportError):
        exec("from edgetune import tran")


def test_errors_carry_no_exit_code() -> None:
    assert not [name for name, value in vars(errors).items() if hasattr(value, "exit_code")]


# --- arguments


@pytest.mark.parametrize(
    ("function", "positional"),
    [
        (prepare, ["checkpoint", "output", "config"]),
        (split, ["bundle", "data", "output", "config"]),
        (train, ["bundle", "data", "output", "config"]),
        (evaluate, ["bundle", "data", "config"]),
        (evaluate_answers, ["model", "data", "config"]),
        (import_adapter, ["source", "bundle", "output", "config"]),
        (export, ["bundle", "adapter", "output", "config"]),
        (generate, ["model", "prompt", "config"]),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_arguments_have_one_order_and_one_name(function: Callable[..., Any], positional: list[str]) -> None:
    """Positional: what is read, the output, the configuration. All else goes by name, and need not be given."""
    parameters = inspect.signature(function).parameters.values()
    assert [each.name for each in parameters if each.kind is each.POSITIONAL_OR_KEYWORD] == positional
    by_name = [each for each in parameters if each.kind is each.KEYWORD_ONLY]
    assert all(each.default is not each.empty for each in by_name)
    assert {each.name for each in by_name} <= {"valid", "adapter", "system", "observer", "say"}
    config = next(each for each in parameters if each.name == "config")
    assert config.default == type(config.default)()
    documentation = inspect.getdoc(function) or ""
    assert "Raises:" in documentation and "Returns:" in documentation
    assert [each.name for each in parameters if f"    {each.name}: " not in documentation] == []


def test_a_bundle_is_a_path_of_either_kind_or_what_was_loaded(tmp_path: Path) -> None:
    kinds: list[Bundle | Path | str] = [load_bundle(str(BUNDLE)), BUNDLE, str(BUNDLE)]
    adapters = [train(bundle, str(ROWS), str(tmp_path / str(number)), CONFIG) for number, bundle in enumerate(kinds)]
    assert [adapter.path for adapter in adapters] == [tmp_path / str(number) for number in range(len(kinds))]
    measured = [
        evaluate(bundle, str(ROWS), adapter=str(adapter.path)) for bundle, adapter in zip(kinds, adapters, strict=True)
    ]
    assert measured[0] == measured[1] == measured[2]
    assert len({"".join(generate(bundle, "Is the lamp on?", GenerateConfig(8))) for bundle in kinds}) == 1
    assert len({len(list(preview(bundle, str(ROWS)))) for bundle in kinds}) == 1


def test_host_functions_take_strings(prepared: Prepared, tmp_path: Path) -> None:
    bundle = prepared("multi-head", "int4")
    save_adapter(tmp_path / "adapter", bundle)
    kinds: list[Bundle | str] = [bundle, str(bundle.path)]
    for number, kind in enumerate(kinds):
        report = export(kind, str(tmp_path / "adapter"), str(tmp_path / f"model{number}"), ExportConfig(merge=False))
        assert (report.path, report.path.is_dir()) == (tmp_path / f"model{number}", True)
    with pytest.raises(UsageError, match="nowhere"):
        prepare(str(tmp_path / "nowhere"), str(tmp_path / "bundle"))
    with pytest.raises(UsageError, match="output"):
        (tmp_path / "output").mkdir()
        (tmp_path / "output" / "mine").touch()
        split(kinds[1], str(ROWS), str(tmp_path / "output"))


def test_a_loaded_bundle_is_not_verified_again_and_a_path_is(tmp_path: Path) -> None:
    bundle = load_bundle(copy_of_bundle(BUNDLE, tmp_path / "bundle"))
    expected = evaluate(bundle, VALID)
    (bundle.path / "adamw.onnx").write_bytes(b"changed")
    assert evaluate(bundle, VALID) == expected
    with pytest.raises(VerificationError, match=r"adamw\.onnx"):
        evaluate(bundle.path, VALID)


# --- one process, many calls


def test_nothing_is_printed_unless_it_is_asked_for(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    long = tmp_path / "rows.jsonl"
    long.write_text(ROWS.read_text(encoding="utf-8") + '{"messages": [{"role": "user", "content": "<|end|>"}, '
                    '{"role": "assistant", "content": "yes"}]}\n', encoding="utf-8")  # fmt: skip
    train(BUNDLE, long, tmp_path / "adapter", CONFIG, valid=long)
    evaluate(BUNDLE, long)
    list(generate(BUNDLE, "<|end|>", GenerateConfig(2)))
    assert capfd.readouterr() == ("", "")
    said: list[str] = []
    evaluate(BUNDLE, long, say=said.append)
    list(generate(BUNDLE, "<|end|>", GenerateConfig(2), say=said.append))
    assert len(said) == 2 and all("control tokens" in line for line in said)


class EnoughError(Exception):
    """What an observer may raise."""


class Stopping(Observer):
    """Hears steps alone, and stops the run after the second."""

    def __init__(self, kind: type[BaseException]) -> None:
        self.kind = kind
        self.losses: list[float] = []

    def on_step(self, metrics: StepMetrics) -> None:
        self.losses.append(metrics.loss)
        if metrics.step == 2:
            raise self.kind


@pytest.mark.parametrize("kind", [EnoughError, KeyboardInterrupt])
def test_an_observer_hears_what_it_overrides_and_may_stop_the_run(kind: type[BaseException], tmp_path: Path) -> None:
    observer = Stopping(kind)
    with pytest.raises(kind):
        # On a slow machine two steps take long enough for the state to be worth saving.
        train(BUNDLE, ROWS, tmp_path / "adapter", replace(CONFIG, save_steps=100), valid=VALID, observer=observer)
    assert len(observer.losses) == 2
    assert [path.name for path in tmp_path.iterdir() if "lock" not in path.name] == []
    assert train(BUNDLE, ROWS, tmp_path / "adapter", CONFIG).steps == 3


@pytest.mark.parametrize("runtime", ["onnxruntime", "openvino"])
def test_runs_of_one_process_do_not_disturb_each_other(runtime: Any, tmp_path: Path) -> None:
    """The second run makes the first one's adapter, also after a run with other options, and in another thread."""
    config = replace(CONFIG, runtime=runtime, threads=1)
    before = evaluate(BUNDLE, VALID)
    train(BUNDLE, ROWS, tmp_path / "first", config)
    train(BUNDLE, ROWS, tmp_path / "other", replace(config, seed=5, batch_size=2, packing=False))
    train(BUNDLE, ROWS, tmp_path / "second", config)
    thread = Thread(target=train, args=(BUNDLE, ROWS, tmp_path / "third", config))
    thread.start()
    thread.join()
    first, other, second, third = (
        (tmp_path / name / "adapter_model.safetensors").read_bytes() for name in ("first", "other", "second", "third")
    )
    assert first == second == third != other
    assert evaluate(BUNDLE, VALID) == before
    assert evaluate(BUNDLE, VALID, EvaluateConfig(threads=1), adapter=tmp_path / "first").loss != before.loss


def test_nothing_of_a_device_goes_on_the_network(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[object] = []
    monkeypatch.setattr("socket.socket.connect", lambda socket, address: asked.append(address))
    monkeypatch.setattr("socket.getaddrinfo", lambda host, *rest, **more: asked.append(host) or [])
    train(BUNDLE, ROWS, tmp_path / "adapter", CONFIG)
    evaluate(BUNDLE, ROWS, adapter=tmp_path / "adapter")
    list(generate(BUNDLE, "Is the lamp on?", GenerateConfig(2)))
    assert asked == []
