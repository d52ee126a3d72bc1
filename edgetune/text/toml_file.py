"""TOML files: read with messages that name file and line."""

from __future__ import annotations

import re
import stat
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from edgetune.errors import UsageError

_HEADER = re.compile(r"\s*(\[\[?)\s*([^\[\]]+?)\s*\]\]?\s*(?:#.*)?$")
_KEY = re.compile(r"""\s*((?:[A-Za-z0-9_-]+|"[^"]*"|'[^']*')(?:\s*\.\s*(?:[A-Za-z0-9_-]+|"[^"]*"|'[^']*'))*)\s*=""")
_LARGEST = 1 << 20
"""Bytes; people write these files."""


@dataclass(frozen=True)
class TomlFile:
    """What a TOML file says, and where."""

    path: Path
    table: Mapping[str, Any]
    lines: Mapping[tuple[str, ...], int]
    """Line of each key, by its path; of what stands in an inline table, the table's key."""

    def line(self, *keys: str) -> str:
        """`file:line` of a key, or of the nearest one above it."""
        for end in range(len(keys), 0, -1):
            if keys[:end] in self.lines:
                return f"{self.path}:{self.lines[keys[:end]]}"
        return f"{self.path}:1"


def read_toml(path: Path, called: str) -> TomlFile:
    """Read a TOML file.

    Args:
        path: The file.
        called: What messages call it when it is not there, such as `--config`.

    Raises:
        UsageError: No such file, too large, not UTF-8, or no TOML (`file:line: reason`).
    """
    text = _read(path, called)
    try:
        table = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise UsageError(_located(path, text, str(error))) from error
    except RecursionError as error:
        raise UsageError(f"{path}: nested too deeply") from error
    return TomlFile(path, table, _lines(text))


def _read(path: Path, called: str) -> str:
    if path.is_dir():
        raise UsageError(f"{called} {path} is a folder; expected a TOML file")
    try:
        status = path.stat()
        if not stat.S_ISREG(status.st_mode):
            # A pipe might never end, a device never stop.
            raise UsageError(f"{called} {path} is not a regular file; expected a TOML file")
        if status.st_size > _LARGEST:
            raise UsageError(f"{called} {path} has {status.st_size:,} bytes; expected at most {_LARGEST:,}")
        return path.read_bytes().decode("utf-8-sig").replace("\r\n", "\n")
    except FileNotFoundError as error:
        raise UsageError(f"{called} {path}: no such file") from error
    except UnicodeDecodeError as error:
        line = error.object.count(b"\n", 0, error.start) + 1
        raise UsageError(f"{path}:{line}: not UTF-8; save the file as UTF-8") from error


def _located(path: Path, text: str, message: str) -> str:
    """Put the line, which tomllib names at the end of its message, in front, where editors and people look for it."""
    found = re.fullmatch(r"(.*) \(at (?:line (\d+), column \d+|end of document)\)", message, re.DOTALL)
    if found is None:
        return f"{path}: {message}"
    return f"{path}:{found[2] or text.rstrip().count(chr(10)) + 1}: {found[1]}"


def _lines(text: str) -> dict[tuple[str, ...], int]:
    """Where keys are set; tomllib does not tell. Keys of arrays of tables have the index behind the array's name."""
    lines: dict[tuple[str, ...], int] = {}
    counts: dict[tuple[str, ...], int] = {}
    section: tuple[str, ...] = ()
    for number, line in enumerate(text.split("\n"), 1):
        if header := _HEADER.match(line):
            section = _names(header[2])
            if header[1] == "[[":
                counts[section] = counts.get(section, -1) + 1
                lines.setdefault(section, number)
                section = (*section, str(counts[section]))
            lines.setdefault(section, number)
        elif key := _KEY.match(line):
            names = (*section, *_names(key[1]))
            for end in range(len(section) + 1, len(names) + 1):
                lines.setdefault(names[:end], number)
    return lines


def _names(dotted: str) -> tuple[str, ...]:
    return tuple(name.strip().strip("\"'") for name in dotted.split("."))
