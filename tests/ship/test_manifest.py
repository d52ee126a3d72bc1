"""`artifacts/target.schema.json` describes what is written: key by key the classes, and value by value a real file."""

from __future__ import annotations

import copy
import json
import re
from dataclasses import fields
from typing import Any, get_args

import pytest

from edgetune.config import Base, PlatformName
from edgetune.errors import IncompatibleError, VerificationError
from edgetune.formats import manifest
from edgetune.formats.bundle import load_bundle
from edgetune.formats.manifest_json import read_manifest
from edgetune.model import lora, rope
from edgetune.ship import MANIFEST, ROLES, lay_out
from edgetune.ship import manifest as shipped_manifest
from edgetune.ship.manifest import ShippedManifest
from support.repository import ROOT

ARTIFACTS = ROOT / "artifacts"
SCHEMA: dict[str, Any] = json.loads((ARTIFACTS / "target.schema.json").read_text(encoding="utf-8"))
CLASSES = {
    name: next(getattr(module, name) for module in (shipped_manifest, manifest, lora, rope) if hasattr(module, name))
    for name in SCHEMA["$defs"]
    if name[0].isupper()
}
_TYPES: dict[str, Any] = {
    "integer": int, "number": (int, float), "string": str, "boolean": bool, "array": list, "object": dict,
    "null": type(None),
}  # fmt: skip
_NOTES = {"$ref", "$schema", "$defs", "title", "description"}


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    folder = tmp_path_factory.mktemp("shipped") / "web"
    lay_out(load_bundle(ARTIFACTS / "golden" / "bundle"), "web", folder)
    return (folder / MANIFEST).read_bytes()


def problems(value: Any, schema: dict[str, Any], place: str = "") -> list[str]:
    """What a value has against the words of JSON Schema that the file uses; an unknown word is an error."""
    if "$ref" in schema:
        assert schema.keys() <= _NOTES
        return problems(value, SCHEMA["$defs"][schema["$ref"].removeprefix("#/$defs/")], place)
    found: list[str] = []
    for word, wanted in schema.items():
        match word:
            case "type":
                kinds = [wanted] if isinstance(wanted, str) else wanted
                fits = any(isinstance(value, _TYPES[kind]) for kind in kinds)
                if not fits or (isinstance(value, bool) and "boolean" not in kinds):
                    return [f"{place} is no {wanted}"]
            case "const" | "enum":
                found += [] if value in (wanted if word == "enum" else [wanted]) else [f"{place} is {value!r}"]
            case "pattern":
                found += [] if re.search(wanted, value) else [f"{place} is {value!r}"]
            case "minimum":
                found += [] if value >= wanted else [f"{place} is {value}"]
            case "items":
                found += [p for i, item in enumerate(value or []) for p in problems(item, wanted, f"{place}[{i}]")]
            case "required":
                found += [f"{place} lacks {key}" for key in wanted if key not in value]
            case "properties":
                for key in wanted.keys() & value:
                    found += problems(value[key], wanted[key], f"{place}.{key}")
            case "additionalProperties":
                others = value.keys() - schema.get("properties", {})
                if wanted is False:
                    found += [f"{place} has {key}" for key in others]
                else:
                    found += [p for key in others for p in problems(value[key], wanted, f"{place}.{key}")]
            case _:
                raise AssertionError(f"the schema says {word!r}")
    return found


ABSENT = {"Lora": ("rank_stabilised", "rank_pattern", "alpha_pattern", "dora")}
"""Keys that are not written where they say what goes without saying."""


@pytest.mark.parametrize("name", CLASSES)
def test_the_schema_has_the_keys_of_the_classes_in_their_order(name: str) -> None:
    schema, keys = SCHEMA["$defs"][name], [field.name for field in fields(CLASSES[name])]
    assert list(schema["properties"]) == keys
    assert schema["required"] == [key for key in keys if key not in ABSENT.get(name, ())]
    assert schema["additionalProperties"] is False


def test_no_class_is_missing() -> None:
    named = {kind.__name__ for kind in vars(shipped_manifest).values() if hasattr(kind, "__dataclass_fields__")}
    assert named - {"Graph", "TensorSpec"} <= CLASSES.keys()
    assert len(CLASSES) == 13


def test_choices_are_those_of_the_code() -> None:
    definitions = SCHEMA["$defs"]
    assert definitions["ShippedManifest"]["properties"]["target"]["enum"] == list(get_args(PlatformName))
    assert definitions["BaseModel"]["properties"]["weights"]["enum"] == list(get_args(Base))
    assert definitions["ShippedGraph"]["properties"]["role"]["enum"] == list(ROLES)


def test_what_is_written_fits_the_schema(written: bytes) -> None:
    assert problems(json.loads(written), SCHEMA) == []


@pytest.mark.parametrize(
    ("path", "value"),
    [
        (("format_version",), 2),
        (("target",), "fpga"),
        (("max_length",), -1),
        (("files", 0, "path"), "../secret"),
        (("files", 0, "sha256"), "beef"),
        (("graphs", 0, "inputs", 0, "shape"), "batch"),
        (("graphs", 0, "inputs", 0, "meaning"), "more"),
        (("architecture", "tie_word_embeddings"), 1),
        (("lora", "rank"), True),
        (("kinds", "loss"), None),
    ],
)
def test_what_is_wrong_does_not_fit(written: bytes, path: tuple[Any, ...], value: Any) -> None:
    said = copy.deepcopy(json.loads(written))
    place = said
    for key in path[:-1]:
        place = place[key]
    place[path[-1]] = value
    assert problems(said, SCHEMA) != []


def test_reading_it_finds_what_was_changed(written: bytes) -> None:
    assert read_manifest(written, ShippedManifest, MANIFEST).target == "web"
    for wrong in (written.replace(b'"web"', b'"ios"'), written[:-2], written.replace(b"1e-08", b"1e-07")):
        with pytest.raises(VerificationError, match=r"target\.json"):
            read_manifest(wrong, ShippedManifest, MANIFEST)
    with pytest.raises(IncompatibleError, match="format version 7"):
        read_manifest(written.replace(b'"format_version": 1', b'"format_version": 7'), ShippedManifest, MANIFEST)
