"""Manifests: what is read is what was written, to the byte; everything else is refused."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
import random
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edgetune.errors import EdgetuneError, IncompatibleError, VerificationError
from edgetune.formats.manifest import (
    ADAPTER_FORMAT,
    BUNDLE_FORMAT,
    BUNDLE_VERSION,
    FORMAT_VERSION,
    MODEL_FORMAT,
    AdapterManifest,
    BaseModel,
    BundleManifest,
    File,
    Graph,
    ModelManifest,
    TensorSpec,
    Tokenizer,
)
from edgetune.formats.manifest_json import read_manifest, write_manifest
from edgetune.model.architecture import Architecture
from edgetune.model.lora import Lora, Slot
from edgetune.model.rope import Rope

Manifest = BundleManifest | AdapterManifest | ModelManifest
HASH = "0123456789abcdef" * 4
BASE = BaseModel("microsoft/Phi-3-mini-4k-instruct", HASH, "int4")
TOKENIZER = Tokenizer(HASH, None, "<s>", "<|end|>", 32000)
LORA = Lora(8, 16.0, ["qkv_proj"], [Slot("model.layers.0.self_attn.qkv_proj", 3072, 9216)])
ROPE = Rope(96, 10000.0, 1.1902, [1.0, 1.5], [2.0, 1e-7], 4096)
ARCHITECTURE = Architecture(3072, 8192, 32, 32, 32, 96, 32064, 131072, None, False, ROPE)
SPEC = TensorSpec("input_ids", "int64", ["batch", "sequence", 1])
FILE = File("adapters/größe.bin", 2**40, HASH)

BUNDLE = BundleManifest(
    BUNDLE_FORMAT, BUNDLE_VERSION, BASE, ARCHITECTURE, TOKENIZER, LORA, 512, [Graph("step", "step.onnx", [SPEC], [])],
    {"MatMul": 3}, {"edgetune": "1.0"}, [FILE],
)  # fmt: skip
ADAPTER = AdapterManifest(ADAPTER_FORMAT, FORMAT_VERSION, BASE, TOKENIZER, LORA, {"note": 'ü "\\ \n\u2028😀'}, [FILE])
MODEL = ModelManifest(
    MODEL_FORMAT, FORMAT_VERSION, BASE, TOKENIZER, LORA, "fp32", None, {"base": 2.5, "merged": 1e-30}, {}, [FILE]
)
SMALL = AdapterManifest(
    ADAPTER_FORMAT, FORMAT_VERSION, BaseModel("m", "a", "fp32"), Tokenizer("b", None, None, "e", 0),
    Lora(1, 1.5, ["o"], [Slot("s", 1, 2)]), {}, [File("f", 1, "c")],
)  # fmt: skip

replace = dataclasses.replace
WRITTEN: dict[str, Manifest] = {
    "bundle": BUNDLE,
    "adapter": ADAPTER,
    "model": MODEL,
    "nothing listed": replace(ADAPTER, files=[], lora=replace(LORA, slots=[], target_modules=[])),
    "no rope factors": replace(
        BUNDLE, architecture=replace(ARCHITECTURE, rope=replace(ROPE, short_factor=None, long_factor=None))
    ),
    "sliding window": replace(BUNDLE, architecture=replace(ARCHITECTURE, sliding_window=2047)),
    "adapter kept apart": replace(MODEL, adapter="adapters/adapter.onnx_adapter", losses={}),
    "whole alpha": replace(ADAPTER, lora=replace(LORA, alpha=16)),
    "long numbers": replace(ADAPTER, lora=replace(LORA, alpha=0.1 + 0.2), files=[replace(FILE, size=2**63 - 1)]),
    "empty strings": replace(ADAPTER, provenance={"": ""}, base=BaseModel("", "", "")),
    "control characters": replace(ADAPTER, provenance={"\x00\x1f": "\x7f\ufeff"}),
}


def read(data: bytes, kind: type[Any] = AdapterManifest) -> Any:
    return read_manifest(data, kind, "here.json")


@pytest.mark.parametrize("name", WRITTEN)
def test_read_then_write_changes_no_byte(name: str) -> None:
    manifest = WRITTEN[name]
    data = write_manifest(manifest)
    found = read(data, type(manifest))
    assert replace(found, manifest_sha256="") == manifest
    assert write_manifest(found) == data


@pytest.mark.parametrize("manifest", [BUNDLE, ADAPTER, MODEL], ids=["bundle", "adapter", "model"])
def test_the_hash_can_be_checked_without_edgetune(manifest: Manifest) -> None:
    data = write_manifest(manifest)
    found = json.loads(data)["manifest_sha256"]
    assert hashlib.sha256(data.replace(f'"{found}"'.encode(), b'""')).hexdigest() == found


def test_keys_stand_in_the_order_of_the_classes() -> None:
    assert list(json.loads(write_manifest(BUNDLE))) == [field.name for field in dataclasses.fields(BundleManifest)]


# --- one wrong value at every place


def sealed(raw: Any) -> bytes:
    """As an attacker would write it: with the right hash."""
    raw["manifest_sha256"] = ""
    text = json.dumps(raw, indent=1, ensure_ascii=False) + "\n"
    raw["manifest_sha256"] = hashlib.sha256(text.encode(errors="surrogatepass")).hexdigest()
    return (json.dumps(raw, indent=1, ensure_ascii=False) + "\n").encode(errors="surrogatepass")


def places(value: Any, *above: Any) -> list[tuple[Any, ...]]:
    """The path of every value in a JSON document."""
    inside = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else []
    return [above, *(place for key, child in inside for place in places(child, *above, key))]


def changed(raw: Any, place: tuple[Any, ...], change: Callable[[Any, Any], None]) -> bytes:
    raw = json.loads(json.dumps(raw))
    parent = raw
    for key in place[:-1]:
        parent = parent[key]
    change(parent, place[-1])
    return sealed(raw)


def put(value: Any) -> Callable[[Any, Any], None]:
    def change(parent: Any, key: Any) -> None:
        parent[key] = value

    return change


WRONG: dict[str, Any] = {
    "null": None,
    "true": True,
    "a negative number": -1,
    "a fraction": 1.5,
    "a number as text": "7",
    "2^63": 2**63,
    "1e400 in digits": 10**400,
    "a list": [],
    "an object": {},
    "a list of lists": [[[]]],
    "NaN": math.nan,
    "infinity": -math.inf,
    "half a surrogate pair": "\ud800",
}
DOCUMENTS = {
    BundleManifest: json.loads(write_manifest(BUNDLE)),
    AdapterManifest: json.loads(write_manifest(ADAPTER)),
    ModelManifest: json.loads(write_manifest(replace(MODEL, adapter="adapters/adapter.onnx_adapter"))),
}
TYPES: dict[type, set[str]] = {
    str: {"a number as text"},
    int: set(),
    float: {"a negative number", "a fraction", "2^63"},
    list: {"a list"},
    dict: {"an object"},
    bool: {"true"},
}
"""The wrong values that are right where the document has a value of this type."""
OPTIONAL = {"chat_template_sha256", "bos_token", "short_factor", "long_factor", "sliding_window", "adapter"}
NULLED = {"chat_template_sha256": {"a number as text"}, "sliding_window": set()}
"""What is null in the documents, and what else it may be."""
DICTIONARIES = {"gradient_coverage", "provenance", "losses"}
"""Objects with keys of their own; elsewhere an empty object lacks some."""


def accepted(kind: type, document: Any, place: tuple[Any, ...], wrong: str) -> bool:
    value: Any = document
    for key in place:
        value = value[key]
    name = place[-1]
    if value is None:
        return wrong in NULLED[name] or wrong == "null"
    if wrong == "null":
        return name in OPTIONAL
    if wrong == "an object":
        return name in DICTIONARIES
    if "shape" in place and isinstance(name, int):
        return wrong == "a number as text"
    return wrong in TYPES[type(value)]


@pytest.mark.parametrize("kind", DOCUMENTS, ids=lambda kind: kind.__name__)
@pytest.mark.parametrize("wrong", WRONG)
def test_a_wrong_value_is_refused_wherever_it_stands(kind: type[Any], wrong: str) -> None:
    document = DOCUMENTS[kind]
    refused = 0
    for place in places(document)[1:]:
        if place[-1] in ("format", "format_version", "manifest_sha256"):
            continue
        data = changed(document, place, put(WRONG[wrong]))
        if accepted(kind, document, place, wrong):
            assert read(data, kind).manifest_sha256 == json.loads(data)["manifest_sha256"], place
        else:
            with pytest.raises(VerificationError, match=r"here\.json"):
                read(data, kind)
            refused += 1
    assert refused > 10


@pytest.mark.parametrize("kind", DOCUMENTS, ids=lambda kind: kind.__name__)
def test_every_key_is_needed_and_no_other_is_known(kind: type[Any]) -> None:
    document = DOCUMENTS[kind]
    keys = [place for place in places(document)[1:] if isinstance(place[-1], str)]
    fields = [place for place in keys if not DICTIONARIES & set(place[:-1])]
    for place in fields:
        if place[-1] in ("format", "format_version", "manifest_sha256"):
            continue
        with pytest.raises(VerificationError, match=rf"required field missing @ \$.*{place[-1]}"):
            read(changed(document, place, lambda parent, key: parent.pop(key)), kind)
        with pytest.raises(VerificationError, match="extra fields found \\(colour\\)"):
            read(changed(document, place, lambda parent, _: parent.update(colour="red")), kind)
    assert len(fields) > 15


@pytest.mark.parametrize(
    ("place", "value", "message"),
    [
        (("max_length",), True, r"expected a whole number from 0 to 2\^63 − 1, found True @ \$\.max_length"),
        (("max_length",), "512", r"found '512' @ \$\.max_length"),
        (("files", 0, "size"), -1, r"found -1 @ \$\.files\[0\]\.size"),
        (("lora", "alpha"), math.nan, r"expected a finite number, found nan @ \$\.lora\.alpha"),
        (("lora", "rank"), 0, r"rank is 0; expected at least 1 @ \$\.lora"),
        (("base", "name"), [1], r"expected a string of valid Unicode, found list @ \$\.base\.name"),
        (("base",), "x", r"expected an object @ \$\.base"),
        (("graphs", 0, "inputs", 0, "shape", 0), None, r"a whole number or a name, found None @ .*shape\[0\]"),
        (("architecture", "tie_word_embeddings"), 0, r"expected true or false, found 0 @ "),
    ],
)
def test_the_message_names_place_value_and_expectation(place: tuple[Any, ...], value: Any, message: str) -> None:
    with pytest.raises(VerificationError, match=message):
        read(changed(DOCUMENTS[BundleManifest], place, put(value)), BundleManifest)


def test_a_thousand_reasons_are_counted() -> None:
    files = [{"path": 1, "size": 1, "sha256": "x"}] * 1000
    with pytest.raises(VerificationError, match=r"and 990 more") as caught:
        read(changed(DOCUMENTS[AdapterManifest], ("files",), put(files)))
    assert len(str(caught.value)) < 2000


# --- other formats and versions


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("format", BUNDLE_FORMAT, "format is 'edgetune-bundle', expected 'edgetune-adapter'"),
        ("format", None, "format is None, expected"),
        ("format", [[]], "format is list, expected"),
        ("format", "x" * 10_000, "format is 'x+, expected"),
        ("format_version", 2, "format version 2, this edgetune reads 1"),
        ("format_version", 0, "format version 0, this edgetune reads 1"),
        ("format_version", "1", "format version '1', this edgetune reads 1"),
        ("format_version", None, "format version None, this edgetune reads 1"),
    ],
)
def test_another_format_or_version_is_incompatible(key: str, value: object, message: str) -> None:
    with pytest.raises(IncompatibleError, match=rf"here\.json: {message}") as caught:
        read(changed(DOCUMENTS[AdapterManifest], (key,), put(value)))
    assert len(str(caught.value)) < 250


def test_bundles_of_the_first_version_are_read_and_later_ones_are_not() -> None:
    first = dataclasses.replace(BUNDLE, format_version=1)
    assert read_manifest(write_manifest(first), BundleManifest, "here.json").format_version == 1
    later = write_manifest(dataclasses.replace(BUNDLE, format_version=3))
    with pytest.raises(IncompatibleError, match="format version 3, this edgetune reads 1 and 2"):
        read_manifest(later, BundleManifest, "here.json")


@pytest.mark.parametrize("value", [True, 1.0])
def test_a_version_that_only_equals_one_is_refused(value: object) -> None:
    with pytest.raises(VerificationError, match="format_version"):
        read(changed(DOCUMENTS[AdapterManifest], ("format_version",), put(value)))


@pytest.mark.parametrize("kind", [AdapterManifest, BundleManifest, ModelManifest])
@pytest.mark.parametrize("manifest", [BUNDLE, ADAPTER, MODEL])
def test_each_kind_reads_only_itself(manifest: Manifest, kind: type[Any]) -> None:
    if type(manifest) is kind:
        return
    with pytest.raises(IncompatibleError):
        read(write_manifest(manifest), kind)


# --- bytes

GOOD = write_manifest(SMALL)
BROKEN: dict[str, bytes] = {
    "nothing": b"",
    "a blank": b" ",
    "half": GOOD[: len(GOOD) // 2],
    "no last line feed": GOOD[:-1],
    "two documents": GOOD + GOOD,
    "a blank more": GOOD + b" ",
    "CRLF": GOOD.replace(b"\n", b"\r\n"),
    "BOM": b"\xef\xbb\xbf" + GOOD,
    "UTF-16": GOOD.decode().encode("utf-16"),
    "Latin-1": GOOD.replace(b'"m"', b'"\xe4"'),
    "half a UTF-8 sequence": GOOD.replace(b'"m"', b'"\xc3"'),
    "a surrogate in UTF-8": GOOD.replace(b'"m"', b'"\xed\xa0\x80"'),
    "an escaped surrogate": GOOD.replace(b'"m"', b'"\\ud800"'),
    "an escaped letter": GOOD.replace(b'"m"', b'"\\u006d"'),
    "NUL": GOOD.replace(b'"m"', b'"\0"'),
    "a NUL at the end": GOOD + b"\0",
    "no indentation": json.dumps(json.loads(GOOD)).encode(),
    "other order": json.dumps(dict(sorted(json.loads(GOOD).items())), indent=1).encode() + b"\n",
    "a key twice, the last one right": GOOD.replace(b'"name": "m"', b'"name": "x",\n  "name": "m"', 1),
    "a key twice, the first one right": GOOD.replace(b'"name": "m"', b'"name": "m",\n  "name": "x"', 1),
    "a comment": GOOD.replace(b'"m"', b'"m" /* */'),
    "a comma more": GOOD.replace(b'"m",', b'"m",,'),
    "NaN": GOOD.replace(b"1.5", b"NaN"),
    "infinity": GOOD.replace(b"1.5", b"Infinity"),
    "a number that becomes infinite": GOOD.replace(b"1.5", b"1e999"),
    "another spelling of a number": GOOD.replace(b"1.5", b"1.50"),
    "5,000 digits": GOOD.replace(b"1.5", b"1" * 5000),
    "a megabyte of digits": GOOD.replace(b"1.5", b"0." + b"1" * (1 << 20)),
    "100,000 brackets": b"[" * 100_000,
    "100,000 objects": b'{"format":' * 100_000,
    "900 brackets as the format": b'{"format":' + b"[" * 900 + b"]" * 900 + b"}",
    "900 brackets as a value": GOOD.replace(b"1.5", b"[" * 900 + b"]" * 900),
    "a list": b"[]",
    "a string": b'"edgetune-adapter"',
    "null": b"null",
    "an empty object": b"{}",
}


@pytest.mark.parametrize("name", BROKEN)
def test_broken_bytes_are_refused(name: str) -> None:
    assert BROKEN[name] != GOOD
    with pytest.raises((VerificationError, IncompatibleError), match=r"here\.json") as caught:
        read(BROKEN[name])
    assert len(str(caught.value)) < 500


def test_every_single_bit_flip_is_detected() -> None:
    undetected = []
    for index in range(len(GOOD)):
        for bit in range(8):
            data = bytearray(GOOD)
            data[index] ^= 1 << bit
            try:
                read(bytes(data))
                undetected.append((index, bit))
            except (VerificationError, IncompatibleError):
                pass
    assert undetected == []


def test_every_truncation_is_detected() -> None:
    for length in range(len(GOOD)):
        with pytest.raises((VerificationError, IncompatibleError)):
            read(GOOD[:length])


def test_random_damage_to_a_large_manifest_is_detected() -> None:
    slots = [Slot(f"model.layers.{layer}.mlp.down_proj", 8192, 3072) for layer in range(32)]
    good = write_manifest(replace(BUNDLE, lora=replace(LORA, slots=slots)))
    generator = random.Random(0)
    for _ in range(500):
        start = generator.randrange(len(good))
        piece = generator.randbytes(generator.randrange(1, 9))
        data = good[:start] + piece + good[start + len(piece) :]
        if data != good:
            with pytest.raises((VerificationError, IncompatibleError)):
                read(data, BundleManifest)


# --- anything at all

text = st.text(st.characters(exclude_categories=("Cs",)), max_size=8)
whole = st.integers(0, 2**63 - 1)
# ONNX Runtime, wherever it ran before in the process, takes denormal numbers for zero.
number = st.floats(allow_nan=False, allow_infinity=False, allow_subnormal=False)
bases = st.builds(BaseModel, text, text, text)
tokenizers = st.builds(Tokenizer, text, st.none() | text, st.none() | text, text, whole)
loras = st.builds(
    Lora,
    st.integers(1, 99),
    number,
    st.lists(text, max_size=2),
    st.lists(st.builds(Slot, text, whole, whole), max_size=2),
)
specs = st.lists(st.builds(TensorSpec, text, text, st.lists(whole | text, max_size=3)), max_size=2)
files = st.lists(st.builds(File, text, whole, text), max_size=2)
notes = st.dictionaries(text, text, max_size=2)
factors = st.none() | st.lists(number, max_size=3)
ropes = st.builds(Rope, whole, number, number, factors, factors, whole)
architectures = st.builds(Architecture, *[whole] * 8, st.none() | whole, st.booleans(), ropes)
manifests: st.SearchStrategy[Manifest] = st.one_of(
    st.builds(
        BundleManifest, st.just(BUNDLE_FORMAT), st.sampled_from(BundleManifest.VERSIONS), bases, architectures,
        tokenizers, loras, whole,
        st.lists(st.builds(Graph, text, text, specs, specs), max_size=2),
        st.dictionaries(text, whole, max_size=2), notes, files,
    ),
    st.builds(
        AdapterManifest, st.just(ADAPTER_FORMAT), st.just(FORMAT_VERSION), bases, tokenizers, loras, notes, files,
    ),
    st.builds(
        ModelManifest, st.just(MODEL_FORMAT), st.just(FORMAT_VERSION), bases, tokenizers, loras, text,
        st.none() | text, st.dictionaries(text, number, max_size=2), notes, files,
    ),
)  # fmt: skip
json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_subnormal=False) | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=6,
)


@settings(deadline=None, max_examples=150)
@given(manifests)
def test_whatever_is_written_is_read(manifest: Manifest) -> None:
    data = write_manifest(manifest)
    found = read(data, type(manifest))
    assert replace(found, manifest_sha256="") == manifest
    assert write_manifest(found) == data


@settings(deadline=None, max_examples=150)
@given(st.sampled_from(list(DOCUMENTS)), st.data())
def test_whatever_stands_somewhere_is_kept_or_refused(kind: type[Any], data: st.DataObject) -> None:
    document = DOCUMENTS[kind]
    place = data.draw(st.sampled_from(places(document)[1:]))
    written = changed(document, place, put(data.draw(json_values)))
    try:
        found = read(written, kind)
    except (VerificationError, IncompatibleError):
        return
    assert write_manifest(found) == written


@settings(deadline=None, max_examples=150)
@given(st.binary(max_size=200) | json_values.map(lambda value: json.dumps(value).encode()))
def test_whatever_the_bytes_are_the_error_is_one_of_ours(data: bytes) -> None:
    with pytest.raises((VerificationError, IncompatibleError)):
        read(data)


# --- writing and asking


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_a_loss_that_is_not_finite_is_not_written(value: float) -> None:
    with pytest.raises(VerificationError, match="Out of range float values"):
        write_manifest(replace(MODEL, losses={"merged": value}))


def test_a_name_that_is_not_unicode_is_not_written() -> None:
    with pytest.raises(VerificationError, match="surrogates not allowed"):
        write_manifest(replace(ADAPTER, base=replace(BASE, name="caf\udce9")))


def test_a_graph_that_is_not_there_is_named() -> None:
    assert BUNDLE.graph("step").file == "step.onnx"
    with pytest.raises(EdgetuneError, match="no graph for 'loss'"):
        BUNDLE.graph("loss")


def test_slots_name_their_parameters() -> None:
    assert LORA.shapes() == {
        "model.layers.0.self_attn.qkv_proj.lora_A.weight": (8, 3072),
        "model.layers.0.self_attn.qkv_proj.lora_B.weight": (9216, 8),
    }
    assert LORA.scaling_of("qkv_proj") == 2.0
