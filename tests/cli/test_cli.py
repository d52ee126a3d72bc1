"""The command line: help, suggestions, exit codes, config files, and no traceback on anything."""

from __future__ import annotations

import errno
import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import fields, replace
from io import StringIO
from pathlib import Path
from typing import Any

import click
import pytest
from click.testing import CliRunner, Result
from rich.console import Console
from rich.progress import Progress

import edgetune
from edgetune.cli import VERBS, main
from edgetune.cli.failures import exit_code_of
from edgetune.cli.interruption import termination_interrupts
from edgetune.cli.live import Watched
from edgetune.cli.output import notices
from edgetune.cli.progress import BarObserver, LineObserver, duration_text, start_text
from edgetune.config import (
    ChatConfig,
    EvalCommandConfig,
    EvaluateConfig,
    ExportConfig,
    GenerateConfig,
    ImportConfig,
    PrepareConfig,
    ShipConfig,
    SplitConfig,
    TrainConfig,
)
from edgetune.doctor import Finding
from edgetune.errors import (
    DataError,
    EdgetuneError,
    IncompatibleError,
    LockedError,
    MissingDependencyError,
    ResourceError,
    UsageError,
    VerificationError,
)
from edgetune.evaluation import Evaluation
from edgetune.preview import Piece, Preview
from edgetune.text.byte_size import bytes_text
from edgetune.training import Observer, StartInfo, StepMetrics, TrainResult
from support.golden import GOLDEN
from support.small_checkpoint import write_checkpoint

ENVIRONMENT = {**os.environ, "PYTHONPATH": str(Path(edgetune.__file__).parents[1])}


def run(*arguments: str | Path, **environment: str) -> Result:
    return CliRunner(env=environment).invoke(main, [str(argument) for argument in arguments])


@pytest.fixture
def bundle(tmp_path: Path) -> Path:
    """A folder that looks like a bundle from outside, for commands whose stage is a fake."""
    folder = tmp_path / "bundle"
    folder.mkdir()
    (folder / "manifest.json").write_text("{}")
    return folder


@pytest.fixture
def data(tmp_path: Path) -> Path:
    path = tmp_path / "train.jsonl"
    path.write_text('{"text": "hello"}\n')
    return path


EVALUATION = Evaluation(3, 1, 20, 0.5, 1.6487, 0.75, 0.3333)


@pytest.fixture
def evaluate(monkeypatch: pytest.MonkeyPatch, bundle: Path, data: Path) -> Callable[..., Result]:
    """Runs `edgetune eval` with a stage that raises or returns what it is given."""

    def invoke(outcome: BaseException | Evaluation, *flags: str, **environment: str) -> Result:
        def fake(bundle: Path, data: Path, config: EvaluateConfig, **_: object) -> Evaluation:
            if isinstance(outcome, BaseException):
                raise outcome
            return outcome

        monkeypatch.setattr("edgetune.evaluation.evaluate", fake)
        return run("eval", bundle, "--data", data, *flags, **environment)

    return invoke


# Help


def test_help_is_instant_and_imports_no_command() -> None:
    command = [sys.executable, "-m", "edgetune", "--help"]
    best = float("inf")
    for _ in range(20):  # other tests run beside this one: only the best try says what the command itself takes
        begin = time.perf_counter()
        result = subprocess.run(command, env=ENVIRONMENT, capture_output=True, text=True, check=True)
        best = min(best, time.perf_counter() - begin)
        if best < 0.3:
            break
    assert best < 0.3
    assert all(f"  {name} " in result.stdout for name in VERBS)
    loaded = (
        "import sys, edgetune.cli\ntry: edgetune.cli.main(['--help'])\nfinally: print(*sys.modules, file=sys.stderr)"
    )
    result = subprocess.run([sys.executable, "-c", loaded], env=ENVIRONMENT, capture_output=True, text=True, check=True)
    modules = set(result.stderr.split())
    assert "click" in modules
    heavy = {"numpy", "rich", "jinja2", "cattrs", "onnxruntime", "tokenizers", "torch", "edgetune.config"}
    assert not modules & (heavy | {verb.module for verb in VERBS.values()})


def test_the_verbs_are_listed_in_the_order_of_the_work() -> None:
    assert list(VERBS) == [
        "init", "prepare", "split", "data", "plan", "train", "import", "preview", "eval", "export", "generate", "chat",
        "jobs", "ship", "inspect", "report", "runs", "devices", "conformance", "doctor", "completion",
    ]  # fmt: skip
    stdout = run("--help").stdout
    positions = [stdout.index(f"  {name} ") for name in VERBS]
    assert positions == sorted(positions)


def test_version() -> None:
    assert run("--version").stdout == f"edgetune {edgetune.__version__}\n"


def test_no_command_is_a_usage_error_that_shows_the_help() -> None:
    result = run()
    assert (result.exit_code, result.stdout) == (2, "")
    assert "Commands:" in result.stderr


OPTIONS = {
    "init": "output force",
    "prepare": "output config rank alpha rslora rank-pattern alpha-pattern targets dora base quantiser npu calibration "
    "max-length download force quiet json",
    "split": "data output layers length calibration-rows largest-error threads force quiet json",
    "data": "",
    "plan": "device data valid length runtime plan sharding precision trunk lower-layers-cache method queries "
    "memory-budget threads device-type soc-model buckets steps epochs batch-size gradient-accumulation-steps packing "
    "no-packing share-prefixes no-share-prefixes truncate raw-prompts content-as-text layers optimizer-states "
    "eval-steps json",
    "train": "data valid output config runtime device plan sharding precision trunk lower-layers-cache vitisai-config "
    "method queries perturbation-size memory-budget threads device-type require-npu soc-model buckets steps epochs "
    "batch-size gradient-accumulation-steps packing no-packing share-prefixes no-share-prefixes learning-rate "
    "lora-plus-ratio schedule warmup-steps weight-decay max-grad-norm seed shuffle no-shuffle truncate raw-prompts "
    "content-as-text init init-adapter layers resume save-steps eval-steps patience keep-best keep-state time-budget "
    "pause-file pause-below-battery pause-above-temperature optimizer-states force report log-to log-folder quiet "
    "json",
    "import": "bundle output force quiet json",
    "preview": "data raw-prompts content-as-text json",
    "eval": "data adapter truncate raw-prompts content-as-text threads generate metric rows-output compare "
    "max-new-tokens temperature top-p top-k seed quiet json",
    "export": "adapter output merge keep-adapter format checkpoint precision trials no-trials valid least-kept "
    "unmeasured threads force quiet json",
    "generate": "prompt system max-new-tokens temperature top-p top-k seed adapter raw content-as-text threads json",
    "chat": "system max-new-tokens temperature top-p top-k seed adapter content-as-text threads",
    "jobs": "",
    "ship": "target output adapter force quiet json",
    "inspect": "placement buckets device-type soc-model require-npu json",
    "report": "output answers json",
    "runs": "sort json",
    "devices": "",
    "conformance": "json",
    "doctor": "json",
    "completion": "",
}


def command_of(name: str) -> click.Command:
    command = main.get_command(click.Context(main), name)
    assert command is not None
    return command


@pytest.mark.parametrize("name", VERBS)
def test_every_verb_has_its_options_and_help_for_each(name: str) -> None:
    options = [param for param in command_of(name).params if isinstance(param, click.Option) and not param.hidden]
    found = {word.removeprefix("--") for option in options for word in (*option.opts, *option.secondary_opts)}
    assert found == set(OPTIONS[name].split())
    assert all(option.help for option in options)
    short = run(name, "-h")
    assert short.exit_code == 0, (short.output, short.stderr, short.exception)
    assert short.stdout == run(name, "--help").stdout


@pytest.mark.parametrize("name", VERBS)
def test_the_examples_in_the_help_can_be_parsed(name: str) -> None:
    stdout = run(name, "--help").stdout
    examples = [
        line.strip() for line in stdout.split("Examples:")[1].splitlines() if line.strip().startswith("edgetune ")
    ]
    assert examples
    for example in examples:
        _, verb, *arguments = shlex.split(example.split(" | ")[0])
        assert verb == name
        command_of(name).make_context(name, arguments)


@pytest.mark.parametrize("name", ["data", "devices"])
def test_commands_of_a_command_have_help_and_examples_that_can_be_parsed(name: str) -> None:
    group = command_of(name)
    assert isinstance(group, click.Group)
    for each in group.commands.values():
        assert all(param.help for param in each.params if isinstance(param, click.Option))
    examples = [line.split() for line in run(name, "--help").stdout.splitlines() if line.startswith("  edgetune ")]
    assert {words[2] for words in examples} == set(group.commands)
    for _, verb, part, *arguments in examples:
        assert verb == name
        group.commands[part].make_context(part, arguments)


@pytest.mark.parametrize(
    ("name", "config"),
    [
        ("prepare", PrepareConfig()),
        ("split", SplitConfig()),
        ("train", TrainConfig()),
        ("export", ExportConfig()),
        ("import", ImportConfig()),
        ("generate", GenerateConfig()),
        ("chat", ChatConfig()),
        ("eval", EvalCommandConfig()),
        ("ship", ShipConfig()),
    ],
)
def test_every_field_of_a_config_is_an_option_with_its_default(name: str, config: Any) -> None:
    params = {param.name: param for param in command_of(name).params}
    assert {field.name: params[field.name].default for field in fields(config)} == {
        field.name: getattr(config, field.name) for field in fields(config)
    }


# Suggestions


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["exprot"], "no such command 'exprot'; did you mean 'export'?"),
        (["frobnicate"], "no such command 'frobnicate'\n"),
        (["--verison"], "no such option '--verison'; did you mean '--version'?"),
        (["train", "--stepz", "3"], "no such option '--stepz'; did you mean '--steps'?"),
        (["train", "--learning_rate=1e-3"], "no such option '--learning_rate'; did you mean '--learning-rate'?"),
        (["train", "-epochs", "3"], "no such option '-epochs'; did you mean '--epochs'?"),
        (["train", "--lr", "3"], "no such option '--lr'; did you mean '--learning-rate'?"),
        (["train", "--norm", "3"], "no such option '--norm'; did you mean '--max-grad-norm'?"),
        (["train", "--no-shufle"], "no such option '--no-shufle'; did you mean '--no-shuffle'"),
        (["export", "--xyzzy"], "no such option '--xyzzy'\n"),
    ],
)
def test_unknown_words_get_a_suggestion(arguments: list[str], message: str) -> None:
    result = run(*arguments)
    assert result.exit_code == 2
    assert message in result.stderr
    assert "--help'." in result.stderr


@pytest.mark.parametrize("name", list(VERBS))
def test_every_option_is_suggested_for_a_slip_of_the_pen(name: str) -> None:
    for option in OPTIONS[name].split():
        result = run(name, f"--{option}x")
        assert result.exit_code == 2
        assert f"'--{option}'" in result.stderr


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        ("prepare x --output y --rank 0", "'--rank': 0 is not in the range x>=1"),
        ("prepare x --output y --alpha nan", "'--alpha': nan is not a finite number"),
        ("prepare x --output y --targets all", "no projection 'all'; give all-linear, attention, or some of qkv_proj"),
        ("train b --data d --output o --steps 0", "'--steps': 0 is not in the range 1<=x<=1000000000"),
        ("train b --data d --output o --steps 1.5", "'1.5' is not a valid integer"),
        ("train b --data d --output o --learning-rate 0", "0.0 is not in the range 1e-30<=x<=1000; auto is taken as"),
        ("train b --data d --output o --learning-rate Auto", "'Auto' is not a valid float range; auto is taken"),
        ("train b --data d --output o --learning-rate inf", "inf is not in the range 1e-30<=x<=1000"),
        ("train b --data d --output o --epochs -1", "-1.0 is not in the range 1e-09<=x<=1000000"),
        ("train b --data d --output o --steps 3 --epochs 2", "--steps and --epochs exclude each other"),
        ("train b --output o", "Missing option '--data'"),
        ("export b --adapter a --output o --keep-adapter --precision int4", "--precision is for --merge"),
        ("export b --adapter a --output o --keep-adapter --no-trials", "--trials and --no-trials are for"),
        ("export b --adapter a --output o --unmeasured --trials", "--trials and --no-trials are for"),
        ("export b --adapter a --output o --format safetensors --precision int8", "--precision is for --format genai"),
        ("export b --adapter a --output o --valid v --unmeasured", "--unmeasured and --valid exclude each other"),
        ("export b --adapter a --output o --keep-adapter --least-kept 0.9", "--least-kept is for a merge that is"),
        ("export b --adapter a --output o --unmeasured --least-kept 0.9", "--least-kept is for a merge that is"),
        ("export b --adapter a --output o --least-kept 1.5", "'--least-kept': 1.5 is not in the range 0<=x<=1"),
        ("export b --adapter a --output o --least-kept nan", "'--least-kept': nan is not a finite number"),
        ("generate m", "Missing option '--prompt'"),
        ("generate m --prompt x --temperature 0", "'--temperature': 0.0 is not in the range 0.01<=x<=100"),
        ("generate m --prompt x --seed -1", "'--seed': -1 is not in the range 0<=x<=2147483647"),
        ("eval m --data d --metric f1", "'f1' is not one of 'accuracy', 'macro-f1'"),
        ("eval m --data d --metric bleu --seed 3", "--seed, --metric means nothing without --generate; leave it out"),
        ("eval m --data d --generate --truncate", "--truncate means nothing with --generate; leave it out"),
        ("ship b --output o", "Missing option '--target'"),
        ("ship b --output o --target phone", "'phone' is not one of 'android', 'ios', 'web', 'linux-arm64'"),
        ("inspect", "Missing argument 'FOLDER'"),
        ("inspect a b", "unexpected extra argument (b)"),
        ("inspect a --buckets 1x8 --require-npu", "--buckets and --require-npu belong to --placement"),
        ("inspect a --device-type NPU --soc-model 69", "--device-type and --soc-model belong to --placement"),
        ("inspect a --placement openvino --soc-model 69", "--soc-model 69 is a chip of Qualcomm's"),
        ("inspect a --placement qnn --device-type GPU", "not for --device-type GPU"),
    ],
)
def test_wrong_values_are_usage_errors(arguments: str, reason: str) -> None:
    result = run(*arguments.split())
    assert result.exit_code == 2
    assert reason in result.stderr
    assert result.stderr.startswith("error: ")


# Paths


def folder_with(path: Path, name: str) -> Path:
    path.mkdir()
    (path / name).write_text("{}")
    return path


@pytest.mark.parametrize("verb", ["train", "eval", "preview"])
def test_what_is_at_a_path_is_named(tmp_path: Path, bundle: Path, data: Path, verb: str) -> None:
    extra = ["--output", "o"] if verb == "train" else []
    checkpoint = folder_with(tmp_path / "checkpoint", "config.json")
    for arguments, reason in [
        ([bundle, "--data", tmp_path / "nix.jsonl"], "nix.jsonl: no such file"),
        ([bundle, "--data", bundle], "is a folder; expected a JSONL file"),
        (
            [tmp_path / "nix", "--data", data],
            "is not there; expected an edgetune bundle: make one with `edgetune prepare",
        ),
        ([checkpoint, "--data", data], "is a Hugging Face checkpoint; expected an edgetune bundle"),
        ([data, "--data", data], "is a file, not a folder; expected an edgetune bundle"),
    ]:
        result = run(verb, *arguments, *extra)
        assert result.exit_code == 2
        assert reason in result.stderr
        assert len(result.stderr.splitlines()) == 1


def test_the_other_inputs_are_named_as_well(tmp_path: Path, bundle: Path, data: Path) -> None:
    adapter = folder_with(tmp_path / "adapter", "adapter_config.json")
    model = folder_with(tmp_path / "model", "genai_config.json")
    for arguments, reason in [
        (["train", bundle, "--data", data, "--valid", "nix", "--output", "o"], "--valid nix: no such file"),
        (["train", bundle, "--data", data, "--init-adapter", model, "--output", "o"], "expected a LoRA adapter"),
        (["train", bundle, "--data", data, "--config", "nix", "--output", "o"], "--config nix: no such file"),
        (["train", adapter, "--data", data, "--output", "o"], "is a LoRA adapter; expected an edgetune bundle"),
        (["eval", bundle, "--data", data, "--adapter", bundle], "is an edgetune bundle; expected a LoRA adapter"),
        (
            ["export", model, "--adapter", adapter, "--output", "o"],
            "is an ONNX Runtime GenAI model; expected an edgetune",
        ),
        (["generate", adapter, "--prompt", "x"], "is a LoRA adapter; expected an ONNX Runtime GenAI model"),
        (["prepare", bundle, "--output", "o"], "is an edgetune bundle; expected a Hugging Face checkpoint"),
    ]:
        result = run(*arguments)
        assert (result.exit_code, result.stdout) == (2, "")
        assert reason in result.stderr


# Failures


FAILURES = [
    (EdgetuneError("it broke"), 1, "error: it broke\n"),
    (MissingDependencyError("no olive"), 1, "error: no olive\n"),
    (UsageError("not that"), 2, "error: not that\n"),
    (DataError(["a.jsonl:3: no text", "a.jsonl:4: no text"]), 3, "error: a.jsonl:3: no text\na.jsonl:4: no text\n"),
    (IncompatibleError("another base"), 4, "error: another base\n"),
    (VerificationError("changed"), 5, "error: changed\n"),
    (ResourceError("disk is full"), 6, "error: disk is full\n"),
    (LockedError("locked by PID 7"), 7, "error: locked by PID 7\n"),
    (KeyboardInterrupt(), 130, "error: interrupted\n"),
    (MemoryError(), 6, "error: not enough memory; close other programs, or choose a smaller batch, length or model\n"),
    (
        OSError(errno.ENOSPC, "No space left on device"),
        6,
        "error: not enough room on a disk; free some space, or choose another output (No space left on device)\n",
    ),
    (PermissionError(errno.EACCES, "Permission denied", "/x/y"), 1, "error: /x/y: Permission denied\n"),
    (
        ModuleNotFoundError("No module named 'torch'", name="torch"),
        1,
        'error: torch is not installed; pip install "edgetune[host]" brings what prepare and export need; '
        "see `edgetune doctor`\n",
    ),
    (
        ValueError("two\nlines"),
        1,
        "internal error: ValueError: two lines; run again with EDGETUNE_DEBUG=1 for the traceback\n",
    ),
    (
        EOFError(),
        1,
        "internal error: EOFError:; run again with EDGETUNE_DEBUG=1 for the traceback\n",
    ),
]
IDS = [type(error).__name__ for error, _, _ in FAILURES]


@pytest.mark.parametrize(("error", "code", "stderr"), FAILURES, ids=IDS)
def test_every_failure_has_its_exit_code(
    evaluate: Callable[..., Result], error: BaseException, code: int, stderr: str
) -> None:
    result = evaluate(error)
    assert (result.exit_code, result.stdout, result.stderr) == (code, "", stderr)


@pytest.mark.parametrize(("error", "code", "stderr"), FAILURES, ids=IDS)
def test_every_failure_is_an_object_with_json(
    evaluate: Callable[..., Result], error: BaseException, code: int, stderr: str
) -> None:
    result = evaluate(error, "--json")
    assert (result.exit_code, result.stderr) == (code, stderr)
    assert json.loads(result.stdout) == {
        "error": {
            "code": code,
            "message": stderr.removeprefix("error: ").removesuffix("\n"),
            "problems": error.problems if isinstance(error, DataError) else [],
        }
    }


def test_a_full_disk_is_told_with_what_is_free(evaluate: Callable[..., Result]) -> None:
    result = evaluate(OSError(errno.ENOSPC, "No space left on device", "/x/y"))
    assert result.exit_code == 6
    assert re.fullmatch(r"error: /x/y: the disk is full: [\d,]+ bytes are free now.*; free some .*\n", result.stderr)


def test_usage_errors_are_objects_with_json_too() -> None:
    result = run("eval", "--json", "--dota", "x")
    assert json.loads(result.stdout)["error"]["code"] == result.exit_code == 2
    assert "did you mean '--data'?" in json.loads(result.stdout)["error"]["message"]


def test_twenty_problems_are_shown_and_the_rest_counted(evaluate: Callable[..., Result]) -> None:
    result = evaluate(DataError([f"a.jsonl:{line}: bad" for line in range(1, 101)]), "--json")
    assert len(result.stderr.splitlines()) == 21
    assert "… and 80 more" in result.stderr
    assert len(json.loads(result.stdout)["error"]["problems"]) == 20


def test_the_traceback_is_there_for_those_who_ask(evaluate: Callable[..., Result]) -> None:
    assert "Traceback" not in evaluate(ValueError("x")).stderr
    result = evaluate(ValueError("x"), EDGETUNE_DEBUG="1")
    assert "Traceback (most recent call last)" in result.stderr
    assert result.stderr.splitlines()[-1].startswith("internal error: ValueError: x")


def script(tmp_path: Path, body: str) -> list[str]:
    """A Python process that changes a stage and then runs the command line on its arguments."""
    path = tmp_path / "script.py"
    path.write_text(f"import sys, time\n{body}\nfrom edgetune.cli import main\nmain(prog_name='edgetune')\n")
    return [sys.executable, str(path)]


def test_an_interruption_is_one_even_when_a_library_makes_an_error_of_it() -> None:
    with pytest.raises(KeyboardInterrupt), termination_interrupts():
        try:
            signal.raise_signal(signal.SIGTERM)
        except KeyboardInterrupt:
            raise RuntimeError("a graph could not be traced") from None
    with pytest.raises(RuntimeError), termination_interrupts():
        raise RuntimeError("something else")


@pytest.mark.parametrize("bar", [False, True])
def test_an_interruption_that_a_library_lost_ends_training_at_the_next_step(bar: bool) -> None:
    with Progress(console=Console(file=StringIO())) as progress:
        observer = BarObserver(progress, Watched()) if bar else LineObserver(notices(quiet=True))
        observer.on_start(StartInfo("onnxruntime", PLAN, 4, None, 4, 1050, 100, 5, 1, 0, 2, 1200, 300, 4096, 2e-4))
        with termination_interrupts():
            observer.on_step(StepMetrics(1, 1.0, 1e-4, 0.5, 64, 100.0, None, 1.0))
            with suppress(KeyboardInterrupt):
                signal.raise_signal(signal.SIGINT)
            with pytest.raises(KeyboardInterrupt):
                observer.on_step(StepMetrics(2, 1.0, 1e-4, 0.5, 64, 100.0, None, 1.0))
            with pytest.raises(KeyboardInterrupt):
                observer.on_notice("a stage begins")


@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no SIGTERM to catch")
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_signals_clean_up_and_say_so_in_one_line(tmp_path: Path, bundle: Path, data: Path, number: int) -> None:
    body = """
import edgetune.evaluation
def fake(bundle, data, config, **_):
    try:
        print("ready", flush=True)
        time.sleep(60)
    finally:
        print("cleaned up", flush=True)
edgetune.evaluation.evaluate = fake
"""
    command = [*script(tmp_path, body), "eval", str(bundle), "--data", str(data)]
    with subprocess.Popen(
        command, env=ENVIRONMENT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
        process.send_signal(number)
        stdout, stderr = process.communicate(timeout=30)
    assert (process.returncode, stdout, stderr) == (130, "cleaned up\n", "error: interrupted\n")


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs a device that is always full")
def test_what_is_said_of_the_work_is_worth_less_than_the_work(tmp_path: Path, bundle: Path, data: Path) -> None:
    body = """
import edgetune.evaluation
from edgetune.cli.output import notices
def fake(bundle, data, config, **_):
    for line in range(10_000):
        notices(quiet=False)("a line that nobody can read")
    return edgetune.evaluation.Evaluation(3, 1, 20, 0.5, 1.6487, 0.75, 0.3333)
edgetune.evaluation.evaluate = fake
"""
    command = [*script(tmp_path, body), "eval", str(bundle), "--data", str(data), "--json"]
    with Path("/dev/full").open("w") as full:
        result = subprocess.run(command, env=ENVIRONMENT, stdout=subprocess.PIPE, stderr=full, text=True)
    assert result.returncode == 0
    assert json.loads(result.stdout)["loss"] == 0.5


@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no such terminals")
def test_a_progress_bar_outlives_its_terminal(tmp_path: Path) -> None:
    code = """
import os
from edgetune.cli.progress import shown
from edgetune.training.observer import StartInfo, StepMetrics
with shown(quiet=False) as observer:
    observer.on_start(StartInfo("onnxruntime", "a plan", 4, None, 4, 3, 1, 5, 1, 0, 2, 1200, 300, 4096, 2e-4))
    os.close(int(os.environ["TERMINAL"]))
    for step in (1, 2, 3):
        observer.on_step(StepMetrics(step, 1.0, 1e-4, 0.5, 64, 100.0, None, 1.0))
        observer.on_validation(step, 0.5)
print("done")
"""
    main_end, terminal = os.openpty()
    environment = {**ENVIRONMENT, "TERMINAL": str(main_end), "TERM": "xterm"}
    command = [sys.executable, "-c", code]
    with subprocess.Popen(
        command, env=environment, stdout=subprocess.PIPE, stderr=terminal, pass_fds=[main_end], text=True
    ) as process:
        os.close(terminal)
        os.close(main_end)
        stdout, _ = process.communicate(timeout=30)
    assert (process.returncode, stdout) == (0, "done\n")


@pytest.mark.skipif(sys.platform == "win32", reason="pipes break in another way")
@pytest.mark.parametrize("rows", [1, 20_000])
@pytest.mark.parametrize("flag", [(), ("--json",)])
def test_a_reader_that_leaves_is_no_error(
    tmp_path: Path, bundle: Path, data: Path, rows: int, flag: tuple[str, ...]
) -> None:
    body = f"""
import edgetune.preview
from edgetune.preview import Piece, Preview
def fake(bundle, data, **_):
    for line in range({rows}):
        yield Preview(line, [1, 2], [-100, 2], [Piece("a", False), Piece("b", True)], False)
edgetune.preview.preview = fake
"""
    command = [*script(tmp_path, body), "preview", str(bundle), "--data", str(data), *flag]
    reading, writing = os.pipe()
    os.close(reading)
    result = subprocess.run(command, env=ENVIRONMENT, stdout=writing, stderr=subprocess.PIPE, text=True, timeout=60)
    os.close(writing)
    assert (result.returncode, result.stderr) == (1, "")


@pytest.mark.parametrize("arguments", [["inspect", "/"], ["train", "/", "--data", "/", "--output", "/"], ["eval", ""]])
def test_no_traceback_in_a_real_process(arguments: list[str]) -> None:
    command = [sys.executable, "-m", "edgetune", *arguments]
    result = subprocess.run(command, env=ENVIRONMENT, capture_output=True, text=True, timeout=60)
    assert result.returncode == 2
    assert result.stderr.startswith("error: ")
    assert "Traceback" not in result.stderr


# The commands


RESULT = TrainResult("openvino", "whole step", 4, None, Path("adapter"), 3, 0.25, 2.0, 0.5, 61.0, 2_000_000)
PLAN = "fp32, activations computed again, weights streamed"
START = StartInfo("onnxruntime", PLAN, 1, 250_000_000, 4, 3, 2, 5, 1, 0, 2, 1200, 300, 4096, 2e-4)
METRICS = [StepMetrics(step, 1 / step, 2e-4, 0.5, 64, 1234.5, 1_500_000_000, 60.0 * step) for step in (1, 2, 3)]


@pytest.fixture
def trained(monkeypatch: pytest.MonkeyPatch) -> list[TrainConfig]:
    """The configurations that a fake training stage was given."""
    configs: list[TrainConfig] = []

    def fake(
        bundle: Path, data: Path, output: Path, config: TrainConfig, *, valid: Path | None, observer: Observer
    ) -> TrainResult:
        configs.append(config)
        observer.on_notice("1 row is too long")
        observer.on_start(START)
        observer.on_validation(0, 2.0)
        for metrics in METRICS:
            observer.on_step(metrics)
        observer.on_validation(3, 0.5)
        return RESULT

    monkeypatch.setattr("edgetune.training.train", fake)
    return configs


def test_the_first_line_says_what_is_kept() -> None:
    kept = "what enters layer 16 kept on disk for 43% of the rows (2.0 GB)"
    text = start_text(replace(START, kept=kept, saved="every 9 steps"))
    assert text.endswith(f"), {kept}, state saved every 9 steps")
    assert "kept on disk" not in start_text(START)


def train(bundle: Path, data: Path, *flags: str | Path) -> Result:
    return run("train", bundle, "--data", data, "--output", "adapter", *flags)


SIZES = "a number and one of B, kB, MB, GB, KiB, MiB, GiB, such as 3GB"


def test_train_passes_options_on(bundle: Path, data: Path, trained: list[TrainConfig], tmp_path: Path) -> None:
    adapter = folder_with(tmp_path / "old", "adapter_config.json")
    flags = (
        "--runtime ort-training --precision int8 --memory-budget 2.5GiB --steps 7 "
        "--batch-size 2 --gradient-accumulation-steps 3 --learning-rate 1e-3 "
        "--schedule linear --warmup-steps 2 --weight-decay 0.1 --max-grad-norm 0.5 --seed 9 --no-shuffle "
        "--no-packing --truncate --force"
    )
    assert train(bundle, data, *flags.split(), "--init-adapter", adapter).exit_code == 0
    assert train(bundle, data, "--epochs", "1.5").exit_code == 0
    assert train(bundle, data).exit_code == 0
    assert train(bundle, data, "--learning-rate", "auto").exit_code == 0
    assert trained == [
        TrainConfig(
            runtime="ort-training",
            precision="int8",
            memory_budget="2.5GiB",
            steps=7,
            batch_size=2,
            gradient_accumulation_steps=3,
            packing=False,
            learning_rate=1e-3,
            schedule="linear",
            warmup_steps=2,
            weight_decay=0.1,
            max_grad_norm=0.5,
            seed=9,
            shuffle=False,
            truncate=True,
            init_adapter=adapter,
            force=True,
        ),
        TrainConfig(epochs=1.5),
        TrainConfig(),
        TrainConfig(),
    ]


def test_flags_override_the_config_file(bundle: Path, data: Path, trained: list[TrainConfig], tmp_path: Path) -> None:
    config = tmp_path / "train.toml"
    config.write_text("batch-size = 8\nlearning_rate = 1e-3\nepochs = 2\nshuffle = false\n")
    results = [
        train(bundle, data, "--config", config),
        train(bundle, data, "--config", config, "--batch-size", "4", "--shuffle"),
        train(bundle, data, "--config", config, "--steps", "5"),
        train(bundle, data, "--config", config, "--epochs", "1"),
    ]
    assert [result.exit_code for result in results] == [0] * 4
    assert trained == [
        TrainConfig(batch_size=8, learning_rate=1e-3, epochs=2, shuffle=False),
        # 4 and shuffling are the defaults, too: saying them is what counts.
        TrainConfig(batch_size=4, learning_rate=1e-3, epochs=2, shuffle=True),
        TrainConfig(batch_size=8, learning_rate=1e-3, steps=5, shuffle=False),
        TrainConfig(batch_size=8, learning_rate=1e-3, epochs=1, shuffle=False),
    ]


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("seed = 1\nbatch-size = 0\n", ":2: batch_size: 0 is not in the range 1<=x<=1000000."),
        ("learning-rate = nan\n", ":1: learning_rate: nan is not a finite number; auto is taken as well"),
        ("steps = 3\nepochs = 1\n", ":2: steps and epochs exclude each other; keep one of them"),
        ('memory-budget = "3 apples"\n', f":1: memory_budget: '3 apples' is no size; expected {SIZES}"),
        ("stepz = 3\n", ":1: unknown key 'stepz'; did you mean 'steps'?"),
        ("steps = \n", ":1: Invalid value"),
    ],
)
def test_a_config_file_is_held_to_the_ranges_of_the_flags(
    bundle: Path, data: Path, trained: list[TrainConfig], tmp_path: Path, text: str, reason: str
) -> None:
    config = tmp_path / "train.toml"
    config.write_text(text)
    result = train(bundle, data, "--config", config)
    assert (result.exit_code, result.stderr, trained) == (2, f"error: {config}{reason}\n", [])


def test_the_first_line_says_what_common_prefixes_save() -> None:
    assert "300 of them trained, 67% saved by common prefixes), 3 steps" in start_text(
        replace(START, shared_prefixes=0.667)
    )
    assert "common prefixes" not in start_text(replace(START, shared_prefixes=0.004))


def test_train_writes_plain_lines_where_there_is_no_terminal(
    bundle: Path, data: Path, trained: list[TrainConfig]
) -> None:
    result = train(bundle, data)
    assert result.stdout == "adapter: 3 steps in 0:01:01, loss 0.2500\nvalidation loss 2.0000 -> 0.5000\n"
    assert result.stderr.splitlines() == [
        "1 row is too long",
        "5 rows (1,200 tokens, 300 of them trained), 3 steps (2 an epoch), learning rate 0.0002, 4,096 "
            "parameters, on onnxruntime "
        f"({PLAN}, room for 1 row at a time, about 250.0 MB), state saved never",
        "validation loss 2.0000 before training",
        "step 1/3: loss 1.0000, lr 2.00e-04, 1,234 tokens/s, ETA 0:01:00, peak 1.5 GB",
        "step 2/3: loss 0.5000, lr 2.00e-04, 1,234 tokens/s, ETA 0:02:00, peak 1.5 GB",
        "step 3/3: loss 0.3333, lr 2.00e-04, 1,234 tokens/s, ETA 0:03:00, peak 1.5 GB",
        "validation loss 0.5000 after step 3",
    ]
    assert train(bundle, data, "--quiet").stderr == ""
    assert json.loads(train(bundle, data, "--json").stdout) == {
        "path": "adapter",
        "steps": 3,
        "final_loss": 0.25,
        "first_validation_loss": 2.0,
        "last_validation_loss": 0.5,
        "seconds": 61.0,
        "runtime": "openvino",
        "plan": "whole step",
        "pass_rows": 4,
        "predicted_peak_memory_bytes": None,
        "peak_memory_bytes": 2_000_000,
        "best_step": None,
        "placement": [],
    }


def test_long_runs_write_about_a_hundred_lines() -> None:
    lines: list[str] = []
    observer = LineObserver(lines.append)
    observer.on_start(StartInfo("onnxruntime", PLAN, 4, None, 4, 1050, 100, 5, 1, 0, 2, 1200, 300, 4096, 2e-4))
    for step in range(1, 1051):
        observer.on_step(StepMetrics(step, 1.0, 1e-4, 0.5, 64, 100.0, None, 1.0))
    steps = [int(line.split()[1].split("/")[0]) for line in lines[1:]]
    assert (steps[0], steps[-1]) == (1, 1050)
    assert 90 <= len(steps) <= 102


@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no pseudo-terminals in the standard library")
@pytest.mark.parametrize("fails", [False, True])
def test_a_terminal_gets_a_progress_bar(tmp_path: Path, bundle: Path, data: Path, fails: bool) -> None:
    body = f"""
from pathlib import Path
import edgetune.training
from edgetune.errors import ResourceError
from edgetune.training import StartInfo, StepMetrics, TrainResult
def fake(bundle, data, output, config, valid, observer):
    observer.on_notice("[1] row is too long")
    observer.on_start({START!r})
    for metrics in {METRICS!r}:
        observer.on_step(metrics)
    observer.on_validation(3, 0.5)
    if {fails}:
        raise ResourceError("disk is full")
    return TrainResult("", "", 4, None, Path("adapter"), 3, 0.25, None, None, 61.0, None)
edgetune.training.train = fake
"""
    arguments = ["train", str(bundle), "--data", str(data), "--output", "adapter"]
    terminal, end = os.openpty()
    environment = {**ENVIRONMENT, "TERM": "xterm", "COLUMNS": "200", "NO_COLOR": "1"}
    result = subprocess.run(
        [*script(tmp_path, body), *arguments],
        env=environment,
        stdout=subprocess.PIPE,
        stderr=end,
        text=True,
        timeout=60,
    )
    os.close(end)
    screen = os.read(terminal, 1 << 16).decode()
    os.close(terminal)
    assert "[1] row is too long\r\n" in screen
    assert "validation loss 0.5000 after step 3\r\n" in screen
    assert "3/3 loss 0.3333, lr 2.00e-04, 1,234 tokens/s, ETA 0:03:00, peak 1.5 GB" in screen
    assert screen.count("\x1b[?25l") == screen.count("\x1b[?25h") == 1  # the cursor is hidden and comes back
    if fails:
        assert (result.returncode, result.stdout) == (6, "")
        assert screen.endswith("error: disk is full\r\n")
    else:
        assert (result.returncode, result.stdout) == (0, "adapter: 3 steps in 0:01:01, loss 0.2500\n")


def test_eval_prints_a_table_or_json(evaluate: Callable[..., Result]) -> None:
    stdout = evaluate(EVALUATION).stdout
    for word in ("rows", "trained tokens", "loss", "perplexity", "0.5000", "1.649", "75.0%", "33.3%"):
        assert word in stdout
    assert "1 rows are longer than the bundle's maximum" in stdout
    value = json.loads(evaluate(EVALUATION, "--json").stdout)
    assert value["loss"] == 0.5
    assert value["perplexity"] == 1.6487
    infinite = Evaluation(1, 0, 1, 1e4, float("inf"), 0.0, 0.0)
    assert json.loads(evaluate(infinite, "--json").stdout)["perplexity"] is None


def test_preview_marks_what_is_trained(monkeypatch: pytest.MonkeyPatch, bundle: Path, data: Path) -> None:
    rows = [
        Preview(1, [5, 6, 7], [-100, 6, 7], [Piece("ask\x1b[31m ", False), Piece("answer", True)], False),
        Preview(4, [5], [5], [Piece("all", True)], True),
    ]
    monkeypatch.setattr("edgetune.preview.preview", lambda bundle, data, **_: iter(rows))
    result = run("preview", bundle, "--data", data)
    assert result.stdout == (
        f"{data}:1: 3 tokens, 2 trained\nask\\x1b[31m [[answer]]\n\n"
        f"{data}:4: 1 tokens, 0 trained, longer than the bundle's maximum: left out, or cut with --truncate\n"
        "[[all]]\n\n"
    )
    lines = run("preview", bundle, "--data", data, "--json").stdout.splitlines()
    assert [json.loads(line) for line in lines] == [
        {"line": 1, "input_ids": [5, 6, 7], "labels": [-100, 6, 7]},
        {"line": 4, "input_ids": [5], "labels": [5]},
    ]


def test_bad_rows_end_a_preview_with_their_places(monkeypatch: pytest.MonkeyPatch, bundle: Path, data: Path) -> None:
    def fake(bundle: Path, data: Path, **_: object) -> Iterator[Preview]:
        yield Preview(1, [5], [5], [Piece("all", True)], False)
        raise DataError(["train.jsonl:2: no text"])

    monkeypatch.setattr("edgetune.preview.preview", fake)
    result = run("preview", bundle, "--data", data, "--json")
    assert result.exit_code == 3
    assert [next(iter(json.loads(line))) for line in result.stdout.splitlines()] == ["line", "error"]


def test_generate_streams_or_gives_one_object(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    calls = []

    def fake(model: Path, prompt: str, config: GenerateConfig, *, system: str | None, say: object) -> Iterator[str]:
        calls.append((model, prompt, system, config))
        yield from ("It is ", "23 °C.", "\x1b]0;x\x07")

    monkeypatch.setattr("edgetune.generation.generate", fake)
    model = folder_with(tmp_path / "model", "genai_config.json")
    assert run("generate", model, "--prompt", "Warm?").stdout == "It is 23 °C.\\x1b]0;x\\x07\n"
    result = run("generate", model, "--prompt", "Warm?", "--system", "Short.", "--max-new-tokens", "5", "--json")
    assert json.loads(result.stdout)["text"] == "It is 23 °C.\x1b]0;x\x07"
    assert calls == [
        (model, "Warm?", None, GenerateConfig()),
        (model, "Warm?", "Short.", GenerateConfig(max_new_tokens=5)),
    ]


def test_doctor_says_what_is_missing_and_how_to_get_it(monkeypatch: pytest.MonkeyPatch) -> None:
    numpy = Finding("device", "numpy", "2.4.6", ">=2", "train", True, None)
    torch = Finding("host", "torch", None, "==2.13.*", "prepare", False, 'pip install "edgetune[host]"')
    broken = Finding("device", "click", "7.0", ">=8.2", "train", False, 'pip install "click>=8.2"')
    machine = Finding("machine", "memory", None, "", "", True, None)
    monkeypatch.setattr("edgetune.doctor.examine", lambda: [numpy, torch, machine])
    result = run("doctor")
    assert result.exit_code == 0
    assert result.stdout == (
        "device\n  ✓ numpy: 2.4.6\n"
        'host\n  ✗ torch: missing (needs ==2.13.*), for prepare\n      pip install "edgetune[host]"\n'
        "machine\n  ✓ memory: not found\n"
    )
    monkeypatch.setattr("edgetune.doctor.examine", lambda: [numpy, broken])
    assert run("doctor").exit_code == 1
    result = run("doctor", "--json")
    assert result.exit_code == 1
    value = json.loads(result.stdout)
    assert value["device_complete"] is False
    assert [finding["name"] for finding in value["findings"]] == ["numpy", "click"]


# Text


@pytest.mark.parametrize(
    ("count", "text"),
    [(0, "0 bytes"), (999, "999 bytes"), (1000, "1.0 kB"), (1_500_000, "1.5 MB"), (2_150_000_000, "2.1 GB")],
)
def test_bytes_for_people(count: int, text: str) -> None:
    assert bytes_text(count) == text


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0.0, "0:00:00"), (3661.4, "1:01:01"), (-1.0, "?"), (float("inf"), "?"), (float("nan"), "?"), (1e300, "?")],
)
def test_durations_stay_sane(seconds: float, text: str) -> None:
    assert duration_text(seconds) == text


# Names that are not Unicode

NOT_UNICODE = [
    ["prepare", "{bad}", "--output", "out"],
    ["prepare", "{checkpoint}", "--output", "{bad}"],
    ["prepare", "{checkpoint}", "--output", "out", "--npu", "qdq", "--calibration", "{bad}/train.jsonl"],
    ["split", "{bad}", "--data", "{data}", "--output", "out"],
    ["split", "{golden}", "--data", "{bad}/train.jsonl", "--output", "out"],
    ["plan", "{bad}"],
    ["train", "{bad}", "--data", "{data}", "--output", "out"],
    ["train", "{golden}", "--data", "{data}", "--output", "{bad}/out"],
    ["train", "{golden}", "--data", "{data}", "--output", "out", "--valid", "{bad}/train.jsonl"],
    ["train", "{golden}", "--data", "{data}", "--output", "out", "--init-adapter", "{bad}"],
    ["import", "{bad}", "--bundle", "{golden}", "--output", "out"],
    ["import", "{adapter}", "--bundle", "{bad}", "--output", "out"],
    ["import", "{adapter}", "--bundle", "{golden}", "--output", "{bad}/out"],
    ["preview", "{bad}", "--data", "{data}"],
    ["eval", "{bad}", "--data", "{data}"],
    ["eval", "{golden}", "--data", "{data}", "--adapter", "{bad}"],
    ["export", "{bad}", "--adapter", "{adapter}", "--output", "out"],
    ["export", "{golden}", "--adapter", "{bad}", "--output", "out"],
    ["export", "{golden}", "--adapter", "{adapter}", "--output", "{bad}/out"],
    ["generate", "{bad}", "--prompt", "hello"],
    ["chat", "{bad}"],
    ["ship", "{bad}", "--target", "web", "--output", "out"],
    ["ship", "{golden}", "--target", "web", "--output", "{bad}/out"],
    ["inspect", "{bad}"],
    ["conformance", "{bad}"],
]


@pytest.mark.parametrize("arguments", NOT_UNICODE, ids=" ".join)
def test_a_name_that_is_not_unicode_is_what_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, data: Path, arguments: list[str]
) -> None:
    """By every verb, wherever it stands, and before anything is done: no tokenizer and no runtime is blamed."""
    monkeypatch.chdir(tmp_path)
    bad = shutil.copytree(GOLDEN / "bundle", tmp_path / os.fsdecode(b"caf\xe9"))
    shutil.copy(data, bad)
    write_checkpoint(tmp_path / "checkpoint")
    places = {
        "bad": bad, "checkpoint": tmp_path / "checkpoint", "data": data,
        "golden": GOLDEN / "bundle", "adapter": GOLDEN / "initial_adapter",
    }  # fmt: skip
    result = run(*(argument.format(**places) for argument in arguments))
    assert result.exit_code == exit_code_of(UsageError)
    assert re.search(r"caf\\udce9.*path is not valid Unicode; rename it", result.stderr), result.output
    assert not (tmp_path / "out").exists()


def test_a_former_name_of_a_command_works_and_says_so(bundle: Path, tmp_path: Path) -> None:
    asked = ("--target", "web", "--output", tmp_path / "out")
    now, former = run("ship", bundle, *asked), run("bundle", bundle, *asked)
    assert former.exit_code == now.exit_code == exit_code_of(IncompatibleError)
    assert former.stderr == "`edgetune bundle` is called `edgetune ship` now\n" + now.stderr
    assert "Lay out what an app ships" in run("bundle", "--help").stdout
