"""`--threads`: how many threads compute, counted while commands run, and what that leaves unchanged."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner, Result

from edgetune.cli import main
from edgetune.config import PrepareConfig
from edgetune.errors import UsageError
from edgetune.formats.adapter import MANIFEST
from edgetune.formats.bundle import Bundle, load_manifest
from edgetune.formats.manifest import AdapterManifest
from edgetune.machine import threads
from edgetune.machine.threads import computing_with, thread_count, threads_used, usable_processors
from support.prepared_bundles import prepare_checkpoint
from support.running_threads import edgetune_threads, share_of_several
from support.tiny_phi3 import save_tokenizer

several = pytest.mark.skipif(
    len(os.sched_getaffinity(0)) < 2, reason="with one processor there is never more than one thread"
)
ALONE = 0.15
"""Most of the looks that may find a second thread where one computes: libraries start and end theirs."""
TOGETHER = 0.25
"""Least of the looks that find two threads where two compute; reading and checking have one."""
ROWS = [{"prompt": "lamp " * (20 + number % 7), "completion": f" is {number}"} for number in range(24)]
COMPILED = "step 8/"
"""Of what `train` prints: by then there have been batches of every shape."""
STEPS = ("--steps", 24, "--batch-size", 8, "--no-shuffle")


@pytest.fixture(scope="module")
def wide(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    """Wide enough for products that are worth a second thread."""
    import torch
    from transformers import Phi3Config, Phi3ForCausalLM

    folder = tmp_path_factory.mktemp("wide")
    torch.manual_seed(0)
    sizes = {"hidden_size": 512, "intermediate_size": 1024, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = Phi3Config(
        vocab_size=448,
        num_key_value_heads=4,
        max_position_embeddings=2048,
        original_max_position_embeddings=2048,
        pad_token_id=2,
        bos_token_id=1,
        eos_token_id=2,
        **sizes,
    )
    Phi3ForCausalLM(config).save_pretrained(folder / "checkpoint")
    save_tokenizer(folder / "checkpoint", [text for row in ROWS for text in row.values()], 448)
    return prepare_checkpoint(folder / "checkpoint", folder / "bundle", PrepareConfig(rank=4, max_length=128))


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("rows") / "rows.jsonl"
    path.write_text("".join(f"{json.dumps(row)}\n" for row in ROWS))
    return path


@pytest.fixture(scope="module")
def many_rows(rows: Path) -> Path:
    path = rows.with_name("many.jsonl")
    path.write_text(rows.read_text() * 12)
    return path


@pytest.fixture(scope="module")
def adapter(wide: Bundle, rows: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("trained") / "adapter"
    done = edgetune("train", wide.path, "--data", rows, "--output", folder, "--steps", 1, "--runtime", "onnxruntime")
    assert done.exit_code == 0, done.output
    return folder


def edgetune(*arguments: object) -> Result:
    return CliRunner().invoke(main, [*map(str, arguments)])


def installed(*names: str) -> pytest.MarkDecorator:
    missing = [name for name in names if find_spec(name) is None]
    return pytest.mark.skipif(bool(missing), reason=f"{', '.join(missing)} is not installed")


def shares(*arguments: object, since: str = "", until: str = "") -> tuple[float, float]:
    """How often several threads of a command ran at the same time, with `--threads 1` and with `--threads 2`.

    Args:
        arguments: Of the command; `{}` is the number of threads.
        since: See `edgetune_threads`.
        until: Likewise.
    """
    one, two = (
        share_of_several(edgetune_threads(*given, "--threads", count, since=since, until=until))
        for count in (1, 2)
        for given in [[str(each).format(count) for each in arguments]]
    )
    return one, two


@several
@pytest.mark.parametrize(
    ("runtime", "plan"),
    [
        ("onnxruntime", "keep"),
        ("onnxruntime", "whole"),
        pytest.param("openvino", "keep", marks=installed("openvino")),
        pytest.param("openvino", "whole", marks=installed("openvino")),
        ("ort-training", "whole"),
    ],
)
def test_training(wide: Bundle, rows: Path, tmp_path: Path, runtime: str, plan: str) -> None:
    output = f"{tmp_path}/adapter-{{}}"
    arguments = ("--data", rows, "--output", output, "--runtime", runtime, "--plan", plan, *STEPS)
    one, two = shares("train", wide.path, *arguments, since=COMPILED)
    assert one < ALONE
    assert two > TOGETHER


@several
@installed("onnxruntime_ep_openvino")
@pytest.mark.skipif("GenuineIntel" not in Path("/proc/cpuinfo").read_text(), reason="the plugin wants Intel's")
def test_training_on_the_provider_of_openvino(wide: Bundle, rows: Path, tmp_path: Path) -> None:
    output = f"{tmp_path}/adapter-{{}}"
    arguments = ("--data", rows, "--output", output, "--runtime", "openvino-ep", *STEPS)
    one, two = shares("train", wide.path, *arguments, since=COMPILED)
    assert one < ALONE
    assert two > TOGETHER


@several
def test_evaluating(wide: Bundle, many_rows: Path) -> None:
    one, two = shares("eval", wide.path, "--data", many_rows)
    assert one < ALONE
    assert two > TOGETHER


@several
def test_answering(wide: Bundle) -> None:
    # The answer takes much longer than the start, at which numpy's threads are awake for a moment.
    one, two = shares("generate", wide.path, "--prompt", "lamp " * 1900, "--max-new-tokens", 1500)
    assert one < ALONE
    assert two > TOGETHER


@several
def test_exporting(wide: Bundle, adapter: Path, many_rows: Path, tmp_path: Path) -> None:
    output = f"{tmp_path}/model-{{}}"
    one, two = shares("export", wide.path, "--adapter", adapter, "--valid", many_rows, "--output", output)
    assert one < ALONE
    assert two > TOGETHER


@several
def test_planning(wide: Bundle, rows: Path) -> None:
    one, two = shares("plan", wide.path, "--data", rows, "--runtime", "onnxruntime")
    assert one < ALONE
    assert two > TOGETHER


@several
def test_splitting(wide: Bundle, many_rows: Path, tmp_path: Path) -> None:
    output = f"{tmp_path}/split-{{}}"
    arguments = ("--data", many_rows, "--output", output, "--calibration-rows", 288)
    one, two = shares("split", wide.path, *arguments, since="Choosing scales", until="Quantising")
    assert one < ALONE
    assert two > TOGETHER


@several
@pytest.mark.parametrize("count", [1, 2])
def test_a_pass_of_olive_has_as_many_processors(count: int) -> None:
    code = f"import os; from edgetune.host.olive_pass import _hold_to; _hold_to({count})"
    code += "; print(len(os.sched_getaffinity(0)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == f"{count}\n"


@several
def test_products_of_numpy() -> None:
    get = threads._blas()
    if get is None:
        pytest.skip("numpy has another BLAS here")
    before = get[0]()
    for count in (1, 2):
        with computing_with(count):
            assert get[0]() == count
    assert get[0]() == before


@pytest.mark.own
@several
@pytest.mark.parametrize("runtime", ["onnxruntime", "openvino"])
def test_what_is_learnt_stays_the_same(wide: Bundle, rows: Path, tmp_path: Path, runtime: str) -> None:
    from safetensors.numpy import load_file

    learnt = []
    for count in (1, 2):
        output = tmp_path / str(count)
        arguments = ("--data", rows, "--output", output, "--runtime", runtime, "--steps", 3, "--threads", count)
        arguments += ("--learning-rate", 2e-4)
        assert edgetune("train", wide.path, *arguments).exit_code == 0
        values = load_file(output / "adapter_model.safetensors")
        learnt.append(np.concatenate([value.ravel() for name, value in sorted(values.items()) if "lora_B" in name]))
    one, two = learnt
    # Sums are added up in another order, with openvino in bfloat16 where the processor has it.
    assert one @ two / (np.linalg.norm(one) * np.linalg.norm(two)) > (0.99999 if runtime == "onnxruntime" else 0.99)


def test_the_record_and_the_plan_say_the_number(wide: Bundle, rows: Path, adapter: Path, tmp_path: Path) -> None:
    output = tmp_path / "adapter"
    arguments = ("--data", rows, "--runtime", "onnxruntime", "--steps", 1)
    assert edgetune("train", wide.path, *arguments, "--output", output, "--threads", 1).exit_code == 0
    provenance = load_manifest(output / MANIFEST, AdapterManifest).provenance
    assert provenance["threads"] == "1"
    assert json.loads(provenance["options"])["threads"] == 1
    # Without the option, what the process may use.
    provenance = load_manifest(adapter / MANIFEST, AdapterManifest).provenance
    assert provenance["threads"] == str(usable_processors())
    for given, expected in ((("--threads", 1), 1), ((), usable_processors())):
        done = edgetune("plan", wide.path, *arguments, "--json", *given)
        assert json.loads(done.stdout)["threads"] == expected


def test_the_config_file_has_it(wide: Bundle, rows: Path, tmp_path: Path) -> None:
    config = tmp_path / "train.toml"
    config.write_text("threads = 0\n")
    done = edgetune("train", wide.path, "--data", rows, "--output", tmp_path / "a", "--config", config)
    assert done.exit_code == 2
    assert f"{config}:1: threads: 0 is not in the range x>=1" in done.output


@pytest.mark.parametrize("verb", ["train", "eval", "export", "plan", "split", "generate"])
@pytest.mark.parametrize(("count", "said"), [(0, "range x>=1"), (-3, "range x>=1"), (4096, "this process may run on")])
def test_numbers_that_cannot_be_meant(
    wide: Bundle, rows: Path, adapter: Path, tmp_path: Path, verb: str, count: int, said: str
) -> None:
    more = {
        "train": ("--data", rows, "--output", tmp_path / "new"),
        "eval": ("--data", rows),
        "export": ("--adapter", adapter, "--output", tmp_path / "new"),
        "plan": ("--data", rows),
        "split": ("--data", rows, "--output", tmp_path / "new"),
        "generate": ("--prompt", "lamp"),
    }
    done = edgetune(verb, wide.path, *more[verb], "--threads", count)
    assert done.exit_code == 2, done.output
    assert said in done.output
    assert not (tmp_path / "new").exists()


def test_another_device_has_the_part_of_its_cores(wide: Bundle) -> None:
    found = {}
    for count in (1, 4):
        done = edgetune("plan", wide.path, "--device", "raspberry-pi-5", "--threads", count, "--json")
        found[count] = json.loads(done.stdout)
        assert found[count]["threads"] == count
        assert f"{count} of 4 cores" in found[count]["time_from"]
    assert found[1]["step_seconds"] == pytest.approx(4 * found[4]["step_seconds"])
    done = edgetune("plan", wide.path, "--device", "raspberry-pi-5", "--threads", 5)
    assert done.exit_code == 2
    assert "raspberry-pi-5 has 4 cores" in done.output


def test_without_a_limit_libraries_choose(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(8)))
    monkeypatch.setattr(os, "cpu_count", lambda: 8)
    assert thread_count() is None
    assert threads_used() == 8
    with computing_with(3):
        assert thread_count() == threads_used() == 3
        with computing_with(None):
            assert thread_count() == 3
    assert thread_count() is None
    monkeypatch.setattr(os, "cpu_count", lambda: 64)
    assert thread_count() == 8
    for count in (0, -1, 9):
        with pytest.raises(UsageError, match=f"--threads is {count}"), computing_with(count):
            pass


@several
def test_a_process_that_is_held_to_one_processor_has_one_thread() -> None:
    code = "from edgetune.machine.threads import *; print(usable_processors(), thread_count(), threads_used())"
    processor = min(os.sched_getaffinity(0))
    done = subprocess.run(
        [sys.executable, "-c", f"import os; os.sched_setaffinity(0, {{{processor}}}); {code}"],
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout.split() == ["1", "1", "1"]
