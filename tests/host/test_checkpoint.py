"""Checkpoints: found without the network, checked wholly before any work, and never executed."""

from __future__ import annotations

import json
import os
import pickle
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from edgetune.config import PrepareConfig
from edgetune.errors import EdgetuneError, IncompatibleError, UsageError, VerificationError
from edgetune.host.checkpoint import copy_chat_template, open_checkpoint, read_architecture, refuse_non_finite
from edgetune.model.architecture import tensor_shapes
from edgetune.preparation import prepare
from edgetune.preparation.builder_view import builder_view
from support.small_checkpoint import CONFIG, POINTER, SHAPES, opened, shard, tensors, write_checkpoint, write_json


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return write_checkpoint(tmp_path / "tiny-phi3")


def configure(folder: Path, **changes: Any) -> None:
    """Change `config.json`; None stays null, `...` takes the key out."""
    config = json.loads((folder / "config.json").read_text()) | changes
    write_json(folder / "config.json", {key: value for key, value in config.items() if value is not ...})


def change_tensors(folder: Path, **changes: Any) -> None:
    """Replace tensors by name (with `__` for the dots); None takes one out."""
    values = tensors() | {name.replace("__", "."): value for name, value in changes.items()}
    kept = {name: value for name, value in values.items() if value is not None}
    save_file(kept, folder / "model.safetensors", metadata={"format": "pt"})


# --- good ones


def test_a_folder_is_read(folder: Path) -> None:
    found = opened(folder)
    assert (found.path, found.name) == (folder, "tiny-phi3")
    assert found.weights == [folder / "model.safetensors"]
    architecture = found.architecture
    assert (architecture.hidden_size, architecture.intermediate_size, architecture.head_dim) == (64, 96, 32)
    assert (architecture.num_attention_heads, architecture.num_key_value_heads) == (2, 1)
    assert (architecture.rope.dim, architecture.rope.short_factor) == (32, None)


def test_shards_are_the_same_model(folder: Path) -> None:
    shard(folder)
    found = opened(folder)
    assert [file.name for file in found.weights] == [f"model-0000{n}-of-00002.safetensors" for n in (1, 2)]


@pytest.mark.parametrize("source", ["tiny-phi3", "tiny-phi3/", "./tiny-phi3", "../here/tiny-phi3", "tiny-phi3/."])
def test_the_name_is_the_folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, source: str) -> None:
    write_checkpoint(tmp_path / "here" / "tiny-phi3")
    monkeypatch.chdir(tmp_path / "here")
    assert open_checkpoint(source, download=False, blocks=True).name == "tiny-phi3"
    monkeypatch.chdir("tiny-phi3")
    assert open_checkpoint(".", download=False, blocks=True).name == "tiny-phi3"


@pytest.mark.parametrize(
    ("place", "name", "revision"),
    [
        (f"models--microsoft--Phi-3.5-mini/snapshots/{'0a' * 20}", "microsoft/Phi-3.5-mini", "0a" * 20),
        (f"models--some--phi--3--mini/snapshots/{'b' * 40}", "some/phi--3--mini", "b" * 40),
        (f"models--phi3/snapshots/{'1' * 40}", "phi3", "1" * 40),
        ("models--microsoft--Phi-3/snapshots/main", "main", None),
        (f"models--microsoft--Phi-3/{'a' * 40}", "a" * 40, None),
        (f"phi3/snapshots/{'a' * 40}", "a" * 40, None),
        (f"models--microsoft--Phi-3/snapshots/{'A' * 40}/more", "more", None),
    ],
)
def test_a_snapshot_of_the_hubs_cache_has_the_repositorys_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, place: str, name: str, revision: str | None
) -> None:
    folder = write_checkpoint(tmp_path / place)
    (tmp_path / "link").symlink_to(folder)
    monkeypatch.chdir(folder)
    for source in (str(folder), ".", str(tmp_path / "link")):
        found = open_checkpoint(source, download=False, blocks=True)
        assert (found.name, found.revision) == (name, revision)


@pytest.mark.parametrize("name", ["config.json", "tokenizer.json", "model.safetensors", "generation_config.json"])
def test_a_snapshot_that_was_copied_without_its_blobs_is_told(folder: Path, tmp_path: Path, name: str) -> None:
    (folder / name).unlink(missing_ok=True)
    (folder / name).symlink_to("../../blobs/0a")
    with pytest.raises(VerificationError, match=f"{folder}: links that lead nowhere: {name}; copy .*`cp -rL`.*-dir"):
        opened(folder)


def test_a_folder_whose_name_is_not_unicode_is_refused(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"caf\\udce9': the folder's path is not valid Unicode; rename it"):
        opened(folder.rename(tmp_path / os.fsdecode(b"caf\xe9")))


def test_the_identity_follows_the_weights_alone(folder: Path, tmp_path: Path) -> None:
    identity = opened(folder).sha256()
    assert opened(write_checkpoint(tmp_path / "copy", eos_token_id=[2, 0])).sha256() == identity
    change_tensors(folder, model__norm__weight=np.zeros(64, np.float32))
    assert opened(folder).sha256() != identity


VARIANTS: dict[str, dict[str, Any]] = {
    "multi-head": {"num_key_value_heads": 4},
    "grouped-query": {"num_key_value_heads": 2},
    "tied, partial rotary": {"num_key_value_heads": 1, "tie_word_embeddings": True, "partial_rotary_factor": 0.5},
}


@pytest.mark.parametrize("variant", VARIANTS)
def test_the_tensors_are_those_of_transformers(variant: str) -> None:
    import torch
    from transformers import Phi3Config, Phi3ForCausalLM

    config = CONFIG | {"num_attention_heads": 4, "hidden_size": 128, "num_hidden_layers": 3} | VARIANTS[variant]
    with torch.device("meta"):
        model = Phi3ForCausalLM(Phi3Config(**config))
    expected = {name: tuple(value.shape) for name, value in model.named_parameters()}  # a tied head is none
    assert tensor_shapes(read_architecture(config)) == expected


@pytest.mark.parametrize(
    ("scaling", "short"),
    [
        (None, None),
        ({"type": "longrope", "short_factor": [1.0] * 16, "long_factor": [2.0] * 16}, [1.0] * 16),
        ({"rope_type": "longrope", "short_factor": [1] * 16, "long_factor": [2] * 16}, [1.0] * 16),
        ({"type": "su", "short_factor": [1.5] * 16, "long_factor": [2.0] * 16}, [1.5] * 16),
    ],
)
def test_rope_variants(folder: Path, scaling: Any, short: Any) -> None:
    configure(folder, rope_scaling=scaling, max_position_embeddings=512)
    assert opened(folder).architecture.rope.short_factor == short


# --- not there, and no network

TRAP = """
import os, sys
calls = []
def watch(event, arguments):
    # Not socket.bind: urllib3 looks whether there is IPv6 when it is imported.
    if event in ("socket.connect", "socket.getaddrinfo", "socket.gethostbyname", "socket.sendto"):
        calls.append(event)
sys.addaudithook(watch)
import atexit
atexit.register(lambda: open(os.environ["CALLS"], "w").write(" ".join(calls)))
from edgetune.cli import main
main(prog_name="edgetune")
"""


def command(tmp_path: Path, *arguments: str, **environment: str) -> tuple[subprocess.CompletedProcess[str], str]:
    """Run the command line with a trap on every use of the network; what it said, and what went into the trap."""
    calls = tmp_path / "calls"
    variables = {**os.environ, "CALLS": str(calls), "HF_HOME": str(tmp_path / "hub"), **environment}
    for name in ("HF_HUB_CACHE", "HF_HUB_OFFLINE", "HUGGINGFACE_HUB_CACHE"):
        if name not in environment:
            variables.pop(name, None)
    done = subprocess.run(
        [sys.executable, "-c", TRAP, "prepare", *arguments, "--output", str(tmp_path / "bundle")],
        capture_output=True, text=True, check=False, env=variables, cwd=tmp_path,
    )  # fmt: skip
    return done, calls.read_text()


def test_a_hub_id_that_is_not_here_opens_no_socket(tmp_path: Path) -> None:
    done, calls = command(tmp_path, "microsoft/Phi-3-mini-4k-instruct")
    assert calls == ""
    assert done.returncode == 2
    assert "microsoft/Phi-3-mini-4k-instruct: no such folder, and not in the local hub cache" in done.stderr
    assert "add --download to fetch it, or give a local folder" in done.stderr
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "bundle").exists()


def test_a_hub_that_does_not_answer_is_told(tmp_path: Path) -> None:
    # The same trap does catch a fetch; nobody listens on port 9.
    done, calls = command(tmp_path, "microsoft/Phi-3-mini", "--download", HF_ENDPOINT="http://127.0.0.1:9")
    assert "socket.connect" in calls
    assert done.returncode in (1, 2)
    assert "microsoft/Phi-3-mini" in done.stderr
    assert "Traceback" not in done.stderr


def test_a_hub_id_in_the_cache_is_read_from_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # A snapshot is links into a store of blobs.
    repository = tmp_path / "models--someone--tiny"
    snapshot = repository / "snapshots" / ("a" * 40)
    blobs = write_checkpoint(repository / "blobs")
    snapshot.mkdir(parents=True)
    for blob in blobs.iterdir():
        (snapshot / blob.name).symlink_to(blob)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text("a" * 40)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    found = open_checkpoint("someone/tiny", download=False, blocks=True)
    assert (found.name, found.revision) == ("someone/tiny", "a" * 40)
    assert load_file(builder_view(found, tmp_path / "view") / "model.safetensors").keys() == SHAPES.keys()


@pytest.mark.parametrize(
    "source", ["absent", "./absent", "../absent", "/absent/absent", "a/b/c", "microsoft/", "", "a/b\n", "http://a/b"]
)
def test_a_path_that_is_not_there_is_not_taken_for_a_hub_id(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, source: str
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UsageError, match=r"no such folder, and not a hub id|no config\.json"):
        open_checkpoint(source, download=False, blocks=True)


def test_a_folder_without_config_and_a_file(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"no config\.json; expected a Hugging Face model folder"):
        opened(tmp_path)
    (tmp_path / "file").write_text("")
    with pytest.raises(UsageError, match="is a file; expected a Hugging Face model folder"):
        opened(tmp_path / "file")


# --- another family, or in another form


@pytest.mark.parametrize("family", ["llama", "phi", "phi3_v", "phimoe", "phi4mm", None, 3, "Phi3"])
def test_another_family_is_refused_and_both_are_named(folder: Path, family: object) -> None:
    configure(folder, model_type=family)
    with pytest.raises(IncompatibleError, match=f"model family is {family!r}, expected 'phi3'"):
        opened(folder)


def test_a_quantised_checkpoint_is_refused(folder: Path) -> None:
    configure(folder, quantization_config={"quant_method": "awq", "bits": 4})
    with pytest.raises(IncompatibleError, match="quantised already; expected fp32, bf16 or fp16"):
        opened(folder)


@pytest.mark.parametrize("dtype", [np.int8, np.uint8, np.int32, np.float64, np.bool_])
def test_weights_of_another_type_are_refused(folder: Path, dtype: Any) -> None:
    change_tensors(folder, lm_head__weight=np.zeros((64, 64), dtype))
    with pytest.raises(VerificationError, match=r"lm_head\.weight is of type \w+, expected one of F32, F16, BF16"):
        opened(folder)


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pt", "weights.pth", "model.pkl"])
def test_pickles_are_refused_unread(folder: Path, name: str, tmp_path: Path) -> None:
    class Trap:
        def __reduce__(self) -> Any:
            return (Path.touch, (tmp_path / "ran",))

    (folder / "model.safetensors").unlink()
    (folder / name).write_bytes(pickle.dumps(Trap()))
    with pytest.raises(VerificationError, match=f"found only {name}, which can hold code; save it again with save_pre"):
        opened(folder)
    pickle.loads((folder / name).read_bytes())
    assert (tmp_path / "ran").exists(), "the trap works"


def test_no_weights_at_all(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    with pytest.raises(VerificationError, match=r"expected model\.safetensors or .*index\.json, found neither"):
        opened(folder)


# --- incomplete or broken


@pytest.mark.parametrize("name", SHAPES)
def test_a_missing_or_misshapen_tensor_is_named(folder: Path, name: str) -> None:
    change_tensors(folder, **{name: None})
    with pytest.raises(VerificationError, match=f"{name} is missing"):
        opened(folder)
    shape = (*SHAPES[name][:-1], SHAPES[name][-1] + 1)
    change_tensors(folder, **{name: np.zeros(shape, np.float32)})
    with pytest.raises(VerificationError, match=rf"{name} has shape \[.*\], config\.json says \["):
        opened(folder)


def test_all_that_is_wrong_is_told_and_counted(folder: Path) -> None:
    configure(folder, hidden_size=128, num_hidden_layers=3, head_dim=32)
    with pytest.raises(VerificationError, match=r"embed_tokens.* has shape .*; … and \d+ more"):
        opened(folder)


@pytest.mark.parametrize("name", ["model.layers.1.mlp.down_proj.weight", "model.layers.0.self_attn.qkv_proj.bias", "x"])
def test_a_tensor_that_would_be_lost_is_refused(folder: Path, name: str) -> None:
    change_tensors(folder, **{name: np.zeros(3, np.float32)})
    with pytest.raises(VerificationError, match=f"{name} is not part of a Phi-3 model"):
        opened(folder)


def test_tensors_that_mean_nothing_are_passed_over(folder: Path) -> None:
    change_tensors(folder, model__layers__0__self_attn__rotary_emb__inv_freq=np.zeros(16, np.float32))
    opened(folder)
    configure(folder, tie_word_embeddings=True)
    opened(folder)


def test_a_billion_layers_fill_no_memory(folder: Path) -> None:
    configure(folder, num_hidden_layers=10**9)
    with pytest.raises(VerificationError, match="says 1,000,000,000 layers, the weights are 9 tensors"):
        opened(folder)


@pytest.mark.parametrize("cut", [0, 1, 7, 8, 9, 100, -1, -4096])
def test_truncated_weights_are_refused(folder: Path, cut: int) -> None:
    data = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(data[:cut])
    with pytest.raises(VerificationError, match=r"model\.safetensors: is cut off: it has [\d,]+ .*; copy or download"):
        opened(folder)


@pytest.mark.parametrize("data", [b"\xff" * 64, b"PK\x03\x04" + bytes(60), bytes(64)])
def test_weights_that_are_something_else_are_refused(folder: Path, data: bytes) -> None:
    (folder / "model.safetensors").write_bytes(data)
    with pytest.raises(VerificationError, match=r"model\.safetensors: not a valid safetensors file"):
        opened(folder)


@pytest.mark.parametrize(
    "weight_map",
    [None, {}, [], "x", {"a": "../outside.safetensors"}, {"a": "/outside.safetensors"}, {"a": "model.bin"}, {"a": 3}],
)
def test_an_index_that_leads_elsewhere_is_refused(folder: Path, weight_map: object) -> None:
    shutil.copy(folder / "model.safetensors", folder.parent / "outside.safetensors")
    shard(folder)
    write_json(folder / "model.safetensors.index.json", {"weight_map": weight_map})
    with pytest.raises(VerificationError, match="expected a weight_map to safetensors files in the same folder"):
        opened(folder)


def test_a_missing_shard_is_named(folder: Path) -> None:
    shard(folder)
    (folder / "model-00002-of-00002.safetensors").unlink()
    with pytest.raises(VerificationError, match=r"model-00002-of-00002\.safetensors is missing"):
        opened(folder)


def test_a_tensor_in_two_shards_is_refused(folder: Path) -> None:
    shard(folder)
    second = folder / "model-00002-of-00002.safetensors"
    save_file(load_file(second) | {"model.embed_tokens.weight": np.zeros((64, 64), np.float32)}, second)
    with pytest.raises(VerificationError, match=r"model\.embed_tokens\.weight lies in two files"):
        opened(folder)


def test_a_missing_tokenizer_comes_with_the_fix(folder: Path) -> None:
    (folder / "tokenizer.json").unlink()
    with pytest.raises(VerificationError, match=r"tokenizer\.json is missing; write it with transformers: AutoTokeni"):
        opened(folder)


BROKEN_JSON = {
    "nothing": b"",
    "half": b'{"model_type": "phi3"',
    "a list": b"[]",
    "UTF-16": '{"model_type": "phi3"}'.encode("utf-16"),
    "NUL": b"\0" * 10,
    "deep": b"[" * 100_000,
    "digits": b'{"a": ' + b"1" * 5000 + b"}",
}


@pytest.mark.parametrize("name", ["config.json", "tokenizer.json", "tokenizer_config.json"])
@pytest.mark.parametrize("kind", BROKEN_JSON)
def test_broken_json_is_named(folder: Path, name: str, kind: str) -> None:
    (folder / name).write_bytes(BROKEN_JSON[kind])
    with pytest.raises(VerificationError, match=rf"{name}: (not valid JSON|expected a JSON object|not a tokenizer)"):
        opened(folder)


@pytest.mark.parametrize("name", [
    "config.json", "tokenizer.json", "tokenizer_config.json", "generation_config.json", "special_tokens_map.json",
    "chat_template.jinja", "model.safetensors.index.json", "model-00001-of-00002.safetensors",
])  # fmt: skip
def test_what_git_has_not_fetched_is_named(folder: Path, name: str) -> None:
    """Some of these would be passed over in silence, or be taken for what they are not."""
    shard(folder)
    (folder / name).write_bytes(POINTER)
    with pytest.raises(VerificationError) as caught:
        opened(folder)
    assert f"{folder / name}: a Git LFS pointer in the place of 4,972,489,328 bytes" in str(caught.value)
    assert "run `git lfs pull` in that folder, or download it again" in str(caught.value)


def test_all_that_git_has_not_fetched_is_named_at_once(folder: Path) -> None:
    shard(folder)
    for file in folder.glob("*-of-*"):
        file.write_bytes(POINTER)
    with pytest.raises(VerificationError, match=r"(?s)model-00001-of.*model-00002-of.*git lfs pull"):
        opened(folder)


@pytest.mark.parametrize("name", SHAPES)
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_a_tensor_that_is_not_finite_is_named(folder: Path, name: str, value: float) -> None:
    broken = tensors()[name].copy()
    broken.flat[-1] = value
    change_tensors(folder, **{name: broken})
    with pytest.raises(VerificationError, match=rf"NaN or infinity in 1 of the weights: {name} \(model\.safe"):
        refuse_non_finite(opened(folder))


def test_every_shard_is_looked_at(folder: Path) -> None:
    shard(folder)
    refuse_non_finite(opened(folder))
    for file in folder.glob("*-of-*"):
        save_file({name: np.full_like(value, np.nan) for name, value in load_file(file).items()}, file)
    with pytest.raises(VerificationError, match=r"NaN or infinity in 9 of the weights: .*model-00001.*model-00002"):
        refuse_non_finite(opened(folder))


def test_what_nobody_reads_may_be_anything(folder: Path) -> None:
    change_tensors(folder, model__layers__0__self_attn__rotary_emb__inv_freq=np.full(16, np.nan, np.float32))
    refuse_non_finite(opened(folder))


@pytest.mark.parametrize("place", ["chat_template.jinja", "tokenizer_config.json"])
def test_prepare_refuses_a_chat_template_that_was_cut_off(folder: Path, tmp_path: Path, place: str) -> None:
    broken = "{% for message in messages %}{{ message['content'] }}{% endf"
    if place == "chat_template.jinja":
        (folder / place).write_text(broken)
    else:
        write_json(folder / place, json.loads((folder / place).read_text()) | {"chat_template": broken})
    told: list[str] = []
    with pytest.raises(IncompatibleError, match=r"the model's chat template is broken \(TemplateSyntaxError"):
        prepare(str(folder), tmp_path / "bundle", PrepareConfig(), say=told.append)
    assert not any("Building" in line for line in told)


def test_prepare_refuses_weights_that_are_not_finite_before_it_builds(folder: Path, tmp_path: Path) -> None:
    change_tensors(folder, model__norm__weight=np.full(64, np.nan, np.float32))
    told: list[str] = []
    with pytest.raises(VerificationError, match=r"model\.norm\.weight"):
        prepare(str(folder), tmp_path / "bundle", PrepareConfig(), say=told.append)
    assert not (tmp_path / "bundle").exists()
    assert not any("Building" in line for line in told)


def test_a_tokenizer_larger_than_the_vocabulary_is_refused(folder: Path) -> None:
    tokenizer = json.loads((folder / "tokenizer.json").read_text())
    tokenizer["model"]["vocab"]["zz"] = 64
    write_json(folder / "tokenizer.json", tokenizer)
    with pytest.raises(VerificationError, match=r"tokenizer\.json: has token 64, config\.json says vocab_size 64"):
        opened(folder)


# --- values


@pytest.mark.parametrize(
    "key", ["hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "vocab_size"]
)
@pytest.mark.parametrize("value", [..., None, 0, -1, 1.5, "64", True, [], 10**400, 2**31])
def test_a_size_that_is_none_is_refused(folder: Path, key: str, value: object) -> None:
    configure(folder, **{key: value})
    with pytest.raises(VerificationError, match=f"config.json: {key} is .*; expected whole numbers"):
        opened(folder)


@pytest.mark.parametrize(
    "key",
    [
        "num_key_value_heads",
        "head_dim",
        "max_position_embeddings",
        "original_max_position_embeddings",
        "sliding_window",
    ],
)
@pytest.mark.parametrize("value", [0, -1, 1.5, "64", True, [], 10**400])
def test_a_size_that_may_be_left_out_is_checked_as_well(folder: Path, key: str, value: object) -> None:
    configure(folder, **{key: value})
    with pytest.raises(VerificationError, match=f"config.json: {key} is .*; expected whole numbers"):
        opened(folder)
    configure(folder, **{key: None})
    if key != "num_key_value_heads":  # left out, it is as many as there are heads: other shapes
        opened(folder)


@pytest.mark.parametrize("value", [-1, 64, 1.5, "2", True, [2]])
def test_a_padding_token_outside_the_vocabulary_is_refused(folder: Path, value: object) -> None:
    configure(folder, pad_token_id=value)
    with pytest.raises(VerificationError, match=r"pad_token_id is .*; expected a token's id or null"):
        opened(folder)
    configure(folder, pad_token_id=None)
    opened(folder)


def resized(folder: Path, **config: Any) -> None:
    """Give the weights the shapes of another configuration."""
    configure(folder, **config)
    shapes = tensor_shapes(read_architecture(json.loads((folder / "config.json").read_text())))
    values = {name: np.zeros(shape, np.float32) for name, shape in shapes.items()}
    save_file(values, folder / "model.safetensors")


def test_sizes_that_int4_cannot_take_are_all_named(folder: Path) -> None:
    resized(folder, hidden_size=72, intermediate_size=100, head_dim=48, num_attention_heads=1)
    with pytest.raises(IncompatibleError) as caught:
        opened(folder)
    for part in (
        "hidden_size is 72",
        "intermediate_size is 100",
        "head_dim is 48",
        "multiple of 32",
        "--base fp16 or fp32",
    ):
        assert part in str(caught.value)
    opened(folder, blocks=False)


@pytest.mark.parametrize("rotated", [4, 8, 24])
def test_rotary_widths_that_genai_cannot_take_are_refused(folder: Path, rotated: int) -> None:
    configure(folder, partial_rotary_factor=rotated / 32)
    for blocks in (True, False):
        with pytest.raises(IncompatibleError, match=f"{rotated} rotated dimensions a head, .* multiples of 16"):
            opened(folder, blocks=blocks)


def test_heads_that_cannot_be_shared_are_refused(folder: Path) -> None:
    resized(folder, num_attention_heads=3, num_key_value_heads=2, head_dim=32, hidden_size=96)
    with pytest.raises(
        IncompatibleError, match="num_attention_heads is 3, which is no multiple of num_key_value_heads 2"
    ):
        opened(folder)


@pytest.mark.parametrize(
    "scaling", [{"type": "yarn", "factor": 4.0}, {"type": "longrope", "short_factor": [1.0]}, {"type": "linear"}, "x"]
)
def test_other_rope_scalings_are_refused(folder: Path, scaling: object) -> None:
    configure(folder, rope_scaling=scaling)
    with pytest.raises(IncompatibleError, match=r"rope_scaling|longrope's short_factor"):
        opened(folder)


# --- chat templates


@pytest.mark.parametrize(
    ("template", "expected"),
    [
        ("{{ a }}", "{{ a }}"),
        ([{"name": "tool", "template": "x"}, {"name": "default", "template": "{{ b }}"}], "{{ b }}"),
        ([{"name": "tool", "template": "x"}], None),
        (["x", None, {"name": "default", "template": 3}], None),
        ("", None),
        (None, None),
        (3, None),
        ({"default": "x"}, None),
    ],
)
def test_the_chat_template_of_the_tokenizer_config(
    folder: Path, tmp_path: Path, template: object, expected: str | None
) -> None:
    described = json.loads((folder / "tokenizer_config.json").read_text())
    write_json(folder / "tokenizer_config.json", described | {"chat_template": template})
    assert copy_chat_template(opened(folder), tmp_path) is (expected is not None)
    written = tmp_path / "chat_template.jinja"
    assert (written.read_text() if written.exists() else None) == expected


def test_a_template_file_comes_first(folder: Path, tmp_path: Path) -> None:
    (folder / "chat_template.jinja").write_bytes(b"{{ c }}\r\n")
    assert copy_chat_template(opened(folder), tmp_path)
    assert (tmp_path / "chat_template.jinja").read_bytes() == b"{{ c }}\r\n"


def test_every_refusal_is_one_of_ours(folder: Path) -> None:
    """Any JSON value in the place of any key of `config.json`."""
    for key in [*CONFIG, "rope_scaling", "rope_theta", "partial_rotary_factor", "head_dim", "quantization_config"]:
        for value in (None, True, 0, -1, 1e308, 10**400, "", "x", [], [[]], {}, {"type": []}):
            configure(folder, **CONFIG | {key: value})
            try:
                opened(folder)
            except EdgetuneError as error:
                assert len(str(error)) < 2000, key
            configure(folder, **{key: CONFIG.get(key, ...)})
