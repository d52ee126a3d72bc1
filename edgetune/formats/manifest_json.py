"""Manifests as JSON: reading one and writing it again changes no byte.

What a manifest says is not believed: keys, types and ranges are checked, and its own hash.
"""

from __future__ import annotations

import hashlib
import json
import sys
from collections.abc import Callable
from dataclasses import replace
from typing import Any, TypeVar

import cattrs
from cattrs.errors import BaseValidationError
from cattrs.gen import make_dict_unstructure_fn, override
from cattrs.v import format_exception

from edgetune.errors import IncompatibleError, VerificationError
from edgetune.formats.manifest import AdapterManifest, Manifest, ModelManifest
from edgetune.model.lora import Lora

_SHOWN = 10
"""Reasons in one message."""
ManifestT = TypeVar("ManifestT", bound=Manifest)
_LARGEST = 2**63 - 1
"""No size or count is larger: what takes them is often C."""


def _whole(value: Any) -> bool:
    return type(value) is int and 0 <= value <= _LARGEST


def _text(value: Any) -> bool:
    return type(value) is str and not any("\ud800" <= character <= "\udfff" for character in value)


_VALUES: dict[Any, tuple[str, Callable[[Any], bool]]] = {
    bool: ("true or false", lambda value: type(value) is bool),
    int: ("a whole number from 0 to 2^63 − 1", _whole),
    float: ("a finite number", lambda value: type(value) in (int, float) and abs(value) <= sys.float_info.max),
    str: ("a string of valid Unicode", _text),
    int | str: ("a whole number or a name", lambda value: _text(value) or _whole(value)),
}
"""What a value in the file may be. Nothing is converted: writing it again has to change no byte."""
_converter = cattrs.Converter(forbid_extra_keys=True)
for _type, (_expected, _fits) in _VALUES.items():

    def _structure(value: Any, _: Any, expected: str = _expected, fits: Callable[[Any], bool] = _fits) -> Any:
        if not fits(value):
            raise ValueError(f"expected {expected}, found {_shown(value)}")
        return value

    _converter.register_structure_hook(_type, _structure)


# Not written where they have their defaults, as in manifests that are older than they are.
_absent = override(omit_if_default=True)
_converter.register_unstructure_hook(
    Lora,
    make_dict_unstructure_fn(
        Lora, _converter, rank_stabilised=_absent, rank_pattern=_absent, alpha_pattern=_absent, dora=_absent
    ),
)
_converter.register_unstructure_hook(
    AdapterManifest, make_dict_unstructure_fn(AdapterManifest, _converter, encoding=_absent)
)
_converter.register_unstructure_hook(
    ModelManifest, make_dict_unstructure_fn(ModelManifest, _converter, encoding=_absent, adapters=_absent)
)


def _shown(value: Any) -> str:
    return f"{value!r:.60}" if isinstance(value, str | int | float | None) else type(value).__name__


def _reason(error: BaseException, kind: type | None) -> str:
    if isinstance(error, AttributeError):  # cattrs asks whatever stands for an object for its keys
        return "expected an object"
    return str(error) if isinstance(error, ValueError) else format_exception(error, kind)


def _canonical(manifest: Manifest) -> bytes:
    try:
        text = json.dumps(_converter.unstructure(manifest), indent=1, ensure_ascii=False, allow_nan=False)
        return f"{text}\n".encode()
    except ValueError as error:
        raise VerificationError(f"the manifest holds what JSON cannot: {error}") from error


def write_manifest(manifest: Manifest) -> bytes:
    """The manifest's bytes, with its own hash filled in.

    Raises:
        VerificationError: A number is not finite, or a string is not valid Unicode.
    """
    unsealed = replace(manifest, manifest_sha256="")
    digest = hashlib.sha256(_canonical(unsealed)).hexdigest()
    return _canonical(replace(unsealed, manifest_sha256=digest))


def read_manifest(data: bytes, kind: type[ManifestT], source: str) -> ManifestT:
    """Read and verify a manifest.

    Args:
        data: The file's bytes.
        kind: The class that mirrors it.
        source: What messages call the file.

    Raises:
        VerificationError: It is not JSON, has unknown or missing keys, or was changed.
        IncompatibleError: Another format or a format version that this edgetune does not read.
    """
    try:
        raw = json.loads(data.decode("utf-8"))
    except (ValueError, RecursionError) as error:
        raise VerificationError(f"{source}: not valid JSON ({error}); copy the folder again from its source") from error
    if not isinstance(raw, dict) or raw.get("format") != kind.FORMAT:
        found = _shown(raw.get("format") if isinstance(raw, dict) else raw)
        raise IncompatibleError(f"{source}: format is {found}, expected {kind.FORMAT!r}")
    if raw.get("format_version") not in kind.VERSIONS:
        read = " and ".join(map(str, kind.VERSIONS))
        raise IncompatibleError(
            f"{source}: format version {_shown(raw.get('format_version'))}, this edgetune reads {read}; "
            "make it again with this edgetune, or install the edgetune that wrote it"
        )
    try:
        manifest = _converter.structure(raw, kind)
    except BaseValidationError as error:
        reasons = cattrs.transform_error(error, format_exception=_reason)
        hidden = f"; … and {len(reasons) - _SHOWN} more" if len(reasons) > _SHOWN else ""
        raise VerificationError(f"{source}: {'; '.join(reasons[:_SHOWN])}{hidden}") from error
    if write_manifest(manifest) != data:
        raise VerificationError(f"{source}: was changed after it was written; copy the folder again from its source")
    return manifest
