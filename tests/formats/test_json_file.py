"""JSON objects: whatever else a file holds is refused by its name."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from edgetune.errors import VerificationError
from edgetune.formats.json_file import LARGEST, read_object

WRONG = {
    "nothing": (b"", "not valid JSON"),
    "half": (b'{"a": 1', "not valid JSON"),
    "two": (b"{}{}", "not valid JSON"),
    "deep": (b"[" * 100_000, "not valid JSON"),
    "digits": (b'{"a": %b}' % (b"1" * 5000), "not valid JSON"),
    "UTF-16": ('{"a": 1}'.encode("utf-16"), "not valid JSON"),
    "Latin-1": (b'{"a": "\xe9"}', "not valid JSON"),
    "a list": (b"[]", "expected a JSON object, found list"),
    "null": (b"null", "expected a JSON object, found NoneType"),
    "huge": (b'{"a": "' + b" " * LARGEST, "has more than 16,777,216 bytes"),
}


@pytest.mark.parametrize("kind", WRONG)
def test_what_is_no_object_is_refused(tmp_path: Path, kind: str) -> None:
    data, reason = WRONG[kind]
    path = tmp_path / "a.json"
    path.write_bytes(data)
    with pytest.raises(VerificationError, match=f"{path}: {reason}.*; copy it again$"):
        read_object(path, "copy it again")


def test_what_cannot_be_read_is_refused(tmp_path: Path) -> None:
    for path, reason in ((tmp_path / "none.json", "No such file or directory"), (tmp_path, "Is a directory")):
        with pytest.raises(VerificationError, match=rf"{path}: cannot be read \({reason}\); copy it again"):
            read_object(path, "copy it again")


@pytest.mark.skipif(not Path("/dev/zero").exists(), reason="no endless file")
def test_an_endless_file_ends(tmp_path: Path) -> None:
    (tmp_path / "a.json").symlink_to("/dev/zero")
    with pytest.raises(VerificationError, match="has more than"):
        read_object(tmp_path / "a.json", "copy it again")


def test_objects_are_read_as_they_are(tmp_path: Path) -> None:
    value = {"a": [1, 2.5, None, True], "é": {"b": "日本"}}
    (tmp_path / "a.json").write_text(json.dumps(value, ensure_ascii=False), encoding="utf-8")
    assert read_object(tmp_path / "a.json", "") == value
