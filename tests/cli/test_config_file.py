"""`--config FILE`: TOML to the fields of a config dataclass."""

from __future__ import annotations

from dataclasses import fields
from pathlib import Path

import pytest

from edgetune.cli.config_file import read_config
from edgetune.config import PrepareConfig, TrainConfig
from edgetune.errors import UsageError


def write(folder: Path, text: str | bytes) -> Path:
    path = folder / "train.toml"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return path


def test_every_field_can_be_set(tmp_path: Path) -> None:
    path = write(
        tmp_path,
        """\
runtime = "ort-training"
device = "raspberry-pi-5"
plan = "stream"
sharding = "zero3"
precision = "int8"
trunk = true
lower_layers_cache = "1MB"
vitisai_config = "vaip_config.json"
method = "forward-only"
queries = 3
perturbation-size = 0.1
memory-budget = "3GB"
device-type = "NPU"
require-npu = true
soc-model = 69
threads = 2
buckets = "4x64"
steps = 3
epochs = 2
batch-size = 8
gradient_accumulation_steps = 2
packing = false
share-prefixes = false
learning-rate = 1e-3
lora-plus-ratio = 16
schedule = "linear"
warmup-steps = 1
weight-decay = 0.1
max-grad-norm = 0
optimizer-states = "8bit"
seed = 7
shuffle = false
truncate = true
raw-prompts = true
content-as-text = true
init = "gradient"
init-adapter = "old/adapter"
layers = "16-31"
resume = true
save-steps = 5
eval-steps = 6
patience = 7
keep-best = true
keep-state = true
time-budget = "20m"
pause-below-battery = 20
pause-above-temperature = 80
pause-file = "pause"
force = true
""",
    )
    settings = read_config(path, TrainConfig)
    config = TrainConfig(**{name: setting.value for name, setting in settings.items()})
    assert config == TrainConfig(
        runtime="ort-training",
        device="raspberry-pi-5",
        plan="stream",
        sharding="zero3",
        precision="int8",
        trunk=True,
        lower_layers_cache="1MB",
        vitisai_config=Path("vaip_config.json"),
        method="forward-only",
        queries=3,
        perturbation_size=0.1,
        memory_budget="3GB",
        device_type="NPU",
        require_npu=True,
        soc_model=69,
        threads=2,
        buckets="4x64",
        steps=3,
        epochs=2.0,
        batch_size=8,
        gradient_accumulation_steps=2,
        packing=False,
        share_prefixes=False,
        learning_rate=1e-3,
        lora_plus_ratio=16.0,
        schedule="linear",
        warmup_steps=1,
        weight_decay=0.1,
        max_grad_norm=0.0,
        optimizer_states="8bit",
        seed=7,
        shuffle=False,
        truncate=True,
        raw_prompts=True,
        content_as_text=True,
        init="gradient",
        init_adapter=Path("old/adapter"),
        layers="16-31",
        resume=True,
        save_steps=5,
        eval_steps=6,
        patience=7,
        keep_best=True,
        keep_state=True,
        time_budget="20m",
        pause_below_battery=20.0,
        pause_above_temperature=80.0,
        pause_file=Path("pause"),
        force=True,
    )
    assert settings.keys() == {field.name for field in fields(TrainConfig)}
    assert isinstance(config.epochs, float)
    line = path.read_text().splitlines().index("batch-size = 8") + 1
    assert settings["batch_size"].place == f"{path}:{line}"


def test_a_word_may_stand_for_a_number(tmp_path: Path) -> None:
    setting = read_config(write(tmp_path, 'learning-rate = "auto"\n'), TrainConfig)["learning_rate"]
    assert setting.value == "auto"


def test_an_empty_file_sets_nothing(tmp_path: Path) -> None:
    assert read_config(write(tmp_path, "# nothing yet\n"), TrainConfig) == {}


@pytest.mark.parametrize(
    ("text", "line", "reason"),
    [
        ("steps = 1\n\nlearnin-rate = 1\n", 3, "unknown key 'learnin-rate'; did you mean 'learning_rate'?"),
        ("lr = 1e-3\n", 1, "unknown key 'lr'; did you mean 'learning_rate'?"),
        ("zzz = 1\n", 1, "unknown key 'zzz'"),
        ("seed = 1\n[training]\nsteps = 3\n", 2, "unknown key 'training'"),
        ("# x\nsteps = 'three'\n", 2, "steps is 'three', expected a whole number"),
        ("steps = 1.5\n", 1, "steps is 1.5, expected a whole number"),
        ("steps = true\n", 1, "steps is True, expected a whole number"),
        ("learning-rate = '1e-3'\n", 1, "learning-rate is '1e-3', expected a number, or 'auto'"),
        ("learning-rate = true\n", 1, "learning-rate is True, expected a number, or 'auto'"),
        ("learning-rate = 0\n", 1, "learning_rate: 0.0 is not in the range 1e-30<=x<=1000; auto is taken as well"),
        ("shuffle = 0\n", 1, "shuffle is 0, expected true or false"),
        ("init-adapter = 4\n", 1, "init-adapter is 4, expected a path in quotes"),
        ("schedule = 'cubic'\n", 1, "schedule is 'cubic', expected 'constant' or 'linear' or 'cosine'"),
        ("schedule = ['cosine']\n", 1, "schedule is ['cosine'], expected 'constant' or 'linear' or 'cosine'"),
        ("batch-size = 2\nbatch_size = 3\n", 2, "'batch_size' is set twice, as batch_size and as batch-size"),
        ("steps = 1\nsteps = 2\n", 2, "Cannot overwrite a value"),
        ("steps = 1\nseed 4\n", 2, "Expected '=' after a key in a key/value pair"),
        ("steps = 1\nseed =", 2, "Invalid value"),
        (b"steps = 1\r\n# caf\xe9\r\n", 2, "not UTF-8; save the file as UTF-8"),
        (b"\xff\xfes\x00", 1, "not UTF-8; save the file as UTF-8"),
    ],
)
def test_what_is_wrong_is_named_with_its_line(tmp_path: Path, text: str | bytes, line: int, reason: str) -> None:
    path = write(tmp_path, text)
    with pytest.raises(UsageError) as caught:
        read_config(path, TrainConfig)
    assert str(caught.value) == f"{path}:{line}: {reason}"


def test_a_byte_order_mark_and_dos_lines_are_taken(tmp_path: Path) -> None:
    settings = read_config(write(tmp_path, b"\xef\xbb\xbfsteps = 4\r\nseed = 5\r\n"), TrainConfig)
    assert {name: setting.value for name, setting in settings.items()} == {"steps": 4, "seed": 5}


def test_the_keys_are_those_of_the_class_asked_for(tmp_path: Path) -> None:
    path = write(tmp_path, "rank = 4\n")
    assert read_config(path, PrepareConfig)["rank"].value == 4
    with pytest.raises(UsageError, match="unknown key 'rank'"):
        read_config(path, TrainConfig)


def test_a_missing_file_and_a_folder_are_named(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"nix\.toml: no such file"):
        read_config(tmp_path / "nix.toml", TrainConfig)
    with pytest.raises(UsageError, match="is a folder; expected a TOML file"):
        read_config(tmp_path, TrainConfig)


def test_deep_nesting_is_no_traceback(tmp_path: Path) -> None:
    with pytest.raises(UsageError):
        read_config(write(tmp_path, "seed = " + "[" * 100_000), TrainConfig)
