"""Container images as they lie on a disk: what their layers come to, of the files that are asked for.

Two layouts are read: that of the OCI (`index.json`, blobs under their SHA-256, which is checked), as `skopeo copy`,
`oras copy` and newer `docker save` write it, and that of older `docker save` and of podman (`manifest.json`). A layer
is a tar archive, plain or gzipped; a file in a later one replaces that of an earlier one, and `.wh.NAME` takes away the
NAME of earlier ones (OCI image specification 1.1, layers).
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from edgetune.errors import UsageError, VerificationError
from edgetune.formats.json_file import read_json
from edgetune.formats.storage import sha256_of
from edgetune.importing.archive import Files, Scratch

OCI_INDEX, DOCKER_MANIFEST = "index.json", "manifest.json"
OCI_MARK = "oci-layout"
"""The file that makes a folder an OCI layout."""
_DIGEST = re.compile(r"sha256:([0-9a-f]{64})")
_AGAIN = "copy the image again"
_WHITEOUT, _OPAQUE = ".wh.", ".wh..wh..opq"
_MOST_MANIFESTS = 64
_ONE = "copy the one that is meant with `skopeo copy`, which takes a tag and a platform"


def is_part_of_image(name: str) -> bool:
    """Whether an archive's member may belong to an image: its description, a blob or a layer."""
    return name in (OCI_MARK, OCI_INDEX, DOCKER_MANIFEST) or name.startswith("blobs/") or name.endswith(".tar")


def files_of_image(parts: Files, scratch: Scratch, shown: str, is_wanted: Callable[[str], bool]) -> Files:
    """The files of an image, of which the wanted ones are unpacked.

    Args:
        parts: The files that the image consists of.
        scratch: Where unpacked files go.
        shown: How messages call the image.
        is_wanted: Says of a path in the image whether it is.

    Raises:
        UsageError: There are several images.
        VerificationError: A file is missing or was changed, or a layer cannot be read.
    """
    found: dict[str, Path | None] = {}
    for number, layer in enumerate(_layers(parts, shown)):
        unpacked = scratch.unpack(layer, f"{shown}, layer {number}", is_wanted)
        for name in filter(_hides, unpacked):
            parent, _, last = name.rpartition("/")
            hidden = parent if last == _OPAQUE else f"{parent}/{last.removeprefix(_WHITEOUT)}".removeprefix("/")
            found = {name: path for name, path in found.items() if not f"{name}/".startswith(f"{hidden}/")}
        found |= {name: path for name, path in unpacked.items() if not _hides(name)}
    return found


def _hides(name: str) -> bool:
    return name.rpartition("/")[2].startswith(_WHITEOUT)


def _layers(parts: Files, shown: str) -> list[Path]:
    """The layers of the one image that is there, the lowest first."""
    images = list(_oci_images(parts, shown)) if OCI_MARK in parts else list(_docker_images(parts, shown))
    if not images:
        raise VerificationError(f"{shown}: lists no image; {_AGAIN}")
    if any(layers != images[0] for layers in images):
        raise UsageError(f"{shown}: holds {len(images)} images; {_ONE}")
    return images[0]


def _oci_images(parts: Files, shown: str) -> Iterator[list[Path]]:
    """The layers of each image that the index lists, directly or by another index; signatures and the like are none."""
    waiting = [_json(parts, OCI_INDEX, shown)]
    for _ in range(_MOST_MANIFESTS):
        if not waiting:
            return
        manifest = waiting.pop(0)
        if "manifests" in manifest:
            for entry in _entries(manifest, "manifests", shown):
                # What was signed of an image lies beside it, as one of a platform that there is not.
                platform = entry.get("platform")
                if not isinstance(platform, dict) or platform.get("architecture") != "unknown":
                    waiting.append(_json(parts, _blob(parts, entry, shown), shown))
        else:
            layers = _entries(manifest, "layers", shown)
            yield [_file(parts, _blob(parts, layer, shown), shown) for layer in layers]
    raise VerificationError(f"{shown}: lists more than {_MOST_MANIFESTS} manifests; {_AGAIN}")


def _docker_images(parts: Files, shown: str) -> Iterator[list[Path]]:
    images = read_json(_file(parts, DOCKER_MANIFEST, shown), _AGAIN)
    for image in images if isinstance(images, list) else [images]:
        names = image.get("Layers") if isinstance(image, dict) else None
        if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
            raise VerificationError(f"{shown}: {DOCKER_MANIFEST} lists no layers; {_AGAIN}")
        yield [_file(parts, name, shown) for name in names]


def _entries(manifest: Mapping[str, Any], key: str, shown: str) -> list[dict[str, Any]]:
    entries = manifest.get(key)
    if not isinstance(entries, list) or not all(isinstance(entry, dict) for entry in entries):
        raise VerificationError(f"{shown}: a manifest has no list of {key}; {_AGAIN}")
    return entries


def _blob(parts: Files, entry: Mapping[str, Any], shown: str) -> str:
    """The path of the blob that a manifest describes, whose bytes are the described ones."""
    digest = _DIGEST.fullmatch(str(entry.get("digest")))
    if digest is None:
        raise VerificationError(f"{shown}: {entry.get('digest')!r:.80} is no SHA-256 of a blob; {_AGAIN}")
    name = f"blobs/sha256/{digest[1]}"
    if (found := sha256_of(_file(parts, name, shown))) != digest[1]:
        raise VerificationError(f"{shown}: {name} was changed: its SHA-256 is {found[:16]}…; {_AGAIN}")
    return name


def _json(parts: Files, name: str, shown: str) -> dict[str, Any]:
    value = read_json(_file(parts, name, shown), _AGAIN)
    if not isinstance(value, dict):
        raise VerificationError(f"{shown}: {name} holds no JSON object; {_AGAIN}")
    return value


def _file(parts: Files, name: str, shown: str) -> Path:
    path = parts.get(name)
    if path is None:
        raise VerificationError(f"{shown}: {name} is missing or no regular file; {_AGAIN}")
    return path
