"""Compiled contexts: keyed by all they depend on, verified before they are used, and free of paths."""

from __future__ import annotations

import json
import os
from dataclasses import replace
from pathlib import Path

import onnx
import pytest
from onnx import TensorProto, helper

from edgetune.errors import VerificationError
from edgetune.runtimes.placement import Node, Partition
from edgetune.runtimes.whole import contexts
from edgetune.runtimes.whole.contexts import ContextKey, ContextStore
from edgetune.runtimes.whole.ep_context import check_ep_context

KEY = ContextKey("runtime 1.0", "device", "ab" * 32, "cd" * 32, 4, 128, {"soc_model": "60"})
DATA = bytes(range(256)) * 5
PARTITIONS = [Partition("QNNExecutionProvider", [Node("MatMul", "a"), Node("Add", "b", "too odd")])]


@pytest.fixture
def store(tmp_path: Path) -> ContextStore:
    store = ContextStore(tmp_path)
    store.save(KEY, DATA, PARTITIONS)
    return store


def files(folder: Path) -> list[Path]:
    return sorted(path for path in (folder / ".cache").rglob("*") if path.is_file())


def test_what_was_saved_is_loaded(store: ContextStore, tmp_path: Path) -> None:
    found = store.load(KEY)
    assert found is not None
    assert found.data == DATA
    assert found.partitions == PARTITIONS
    assert [path.name for path in files(tmp_path)] == ["compiled", "record.json"]


@pytest.mark.parametrize(
    "change",
    [
        {"runtime": "runtime 1.1"},
        {"device": "another"},
        {"graph": "ab" * 31 + "ac"},
        {"weights": "00" * 32},
        {"batch": 3},
        {"length": 64},
        {"options": {"soc_model": "69"}},
    ],
)
def test_whatever_changes_takes_another_context(store: ContextStore, change: dict[str, object]) -> None:
    assert store.load(replace(KEY, **change)) is None  # type: ignore[arg-type]
    assert store.load(KEY) is not None


def test_every_changed_byte_is_found(store: ContextStore, tmp_path: Path) -> None:
    for file in range(2):
        size = files(tmp_path)[file].stat().st_size
        for place in range(0, size, 41):
            path = files(tmp_path)[file]
            data = bytearray(path.read_bytes())
            data[place] ^= 4
            path.write_bytes(data)
            assert store.load(KEY) is None
            store.save(KEY, DATA, PARTITIONS)


@pytest.mark.parametrize("cut", [0, 1, 100, 300])
@pytest.mark.parametrize("name", ["compiled", "record.json"])
def test_what_was_cut_off_is_removed(store: ContextStore, tmp_path: Path, name: str, cut: int) -> None:
    (path,) = (path for path in files(tmp_path) if path.name == name)
    path.write_bytes(path.read_bytes()[:cut])
    assert store.load(KEY) is None
    assert files(tmp_path) == []


@pytest.mark.parametrize(
    "text",
    ["null", "[]", "5", '"x"', '{"key": null}', "[" * 100_000, '{"key":' * 100_000, "9" * 5000, "1e999", "\x00"],
    ids=["null", "list", "number", "text", "no key", "deep list", "deep object", "huge", "infinite", "binary"],
)
def test_a_record_that_is_none_is_removed(store: ContextStore, tmp_path: Path, text: str) -> None:
    files(tmp_path)[1].write_text(text)
    assert store.load(KEY) is None
    assert files(tmp_path) == []


def test_a_link_is_not_followed(store: ContextStore, tmp_path: Path) -> None:
    compiled = files(tmp_path)[0]
    (tmp_path / "elsewhere").write_bytes(DATA)
    compiled.unlink()
    compiled.symlink_to(tmp_path / "elsewhere")
    assert store.load(KEY) is None


def test_a_record_of_another_key_counts_as_none(store: ContextStore, tmp_path: Path) -> None:
    record = files(tmp_path)[1]
    content = json.loads(record.read_text())
    content["key"]["graph"] = "00" * 32
    record.write_text(json.dumps(content))
    assert store.load(KEY) is None


def test_where_nothing_can_be_written_nothing_is_kept(tmp_path: Path) -> None:
    (tmp_path / ".cache").write_text("in the way")
    store = ContextStore(tmp_path)
    store.save(KEY, DATA, PARTITIONS)
    assert store.load(KEY) is None


def test_old_contexts_are_dropped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(contexts, "_MOST_BYTES", 6 * len(DATA))
    store = ContextStore(tmp_path)
    for length in range(10):
        store.save(replace(KEY, length=length), DATA, PARTITIONS)
        (record,) = (path for path in files(tmp_path) if f'"length": {length},' in path.read_text(errors="ignore"))
        os.utime(record, (length, length))
    assert [length for length in range(10) if store.load(replace(KEY, length=length))] == [4, 5, 6, 7, 8, 9]
    monkeypatch.setattr(contexts, "_MOST_BYTES", 0)
    store.save(replace(KEY, length=10), DATA, PARTITIONS)
    assert [length for length in range(11) if store.load(replace(KEY, length=length))] == [7, 8, 9, 10]


@pytest.mark.parametrize("missing", ["compiled", "record.json"])
def test_an_incomplete_context_is_dropped_with_the_old_ones(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, missing: str
) -> None:
    monkeypatch.setattr(contexts, "_MOST_BYTES", 0)
    store = ContextStore(tmp_path)
    store.save(replace(KEY, length=99), DATA, PARTITIONS)
    (incomplete,) = (tmp_path / ".cache" / "contexts").iterdir()
    (incomplete / missing).unlink()
    (incomplete.parent / "file").write_text("no context")
    (incomplete.parent / ".another.partial-1").mkdir()
    for length in range(6):
        store.save(replace(KEY, length=length), DATA, PARTITIONS)
    assert not incomplete.exists()
    assert (incomplete.parent / ".another.partial-1").exists(), "somebody writes it"
    assert sum(store.load(replace(KEY, length=length)) is not None for length in range(6)) == 4


def model_with(**attributes: object) -> onnx.ModelProto:
    node = helper.make_node("EPContext", ["x"], ["y"], domain="com.microsoft", **attributes)
    value = [helper.make_tensor_value_info(name, TensorProto.FLOAT, [1]) for name in ("x", "y")]
    return helper.make_model(helper.make_graph([node], "g", value[:1], value[1:]))


@pytest.mark.parametrize("attributes", [{"embed_mode": 1, "ep_cache_context": b"\x00" * 99}, {"ep_cache_context": b""}])
def test_a_context_that_is_inside_passes(attributes: dict[str, object]) -> None:
    check_ep_context(model_with(**attributes).SerializeToString())


@pytest.mark.parametrize("path", ["../secret.bin", "/etc/passwd", "beside.bin", "..\\secret.bin"])
def test_a_path_is_refused(path: str) -> None:
    model = model_with(embed_mode=0, ep_cache_context=path)
    with pytest.raises(VerificationError, match="names the file"):
        check_ep_context(model.SerializeToString())


def test_a_path_in_a_subgraph_or_function_is_refused() -> None:
    inner = model_with(embed_mode=0, ep_cache_context="../x.bin").graph
    outer = model_with(embed_mode=1)
    outer.graph.node.append(helper.make_node("If", ["c"], ["z"], then_branch=inner, else_branch=inner))
    with pytest.raises(VerificationError, match="names the file"):
        check_ep_context(outer.SerializeToString())
    outer = model_with(embed_mode=1)
    outer.functions.append(helper.make_function("d", "f", ["x"], ["y"], list(inner.node), []))
    with pytest.raises(VerificationError, match="names the file"):
        check_ep_context(outer.SerializeToString())


def test_an_attribute_that_occurs_twice_is_refused() -> None:
    """A reader of protobuf takes the last of them, another one may take the first."""
    for modes in ((0, 1), (1, 0)):
        model = model_with(embed_mode=modes[0], ep_cache_context="../x.bin")
        model.graph.node[0].attribute.append(helper.make_attribute("embed_mode", modes[1]))
        with pytest.raises(VerificationError, match=r"names the file '\.\./x\.bin'"):
            check_ep_context(model.SerializeToString())


def test_weights_outside_are_refused() -> None:
    model = model_with(embed_mode=1)
    tensor = TensorProto(name="w", data_type=TensorProto.FLOAT, dims=[1], data_location=TensorProto.EXTERNAL)
    tensor.external_data.add(key="location", value="../../etc/passwd")
    model.graph.initializer.append(tensor)
    with pytest.raises(VerificationError, match="weights in another file"):
        check_ep_context(model.SerializeToString())


@pytest.mark.parametrize("data", [b"", b"\xff" * 40, b"not a model"])
def test_what_is_no_model_is_refused(data: bytes) -> None:
    with pytest.raises(VerificationError, match="no readable ONNX model"):
        check_ep_context(data)


def test_every_cut_is_survived() -> None:
    data = model_with(embed_mode=1, ep_cache_context=b"abc").SerializeToString()
    for end in range(len(data)):
        try:
            check_ep_context(data[:end])
        except VerificationError:
            continue
