"""Container images: layers over each other, and images that are broken or several."""

from __future__ import annotations

import hashlib
import io
import json
import tarfile
from collections.abc import Callable
from pathlib import Path

import pytest

from edgetune.errors import EdgetuneError, UsageError, VerificationError
from edgetune.importing.archive import Files, Scratch
from edgetune.importing.image import files_of_image, is_part_of_image
from support.foreign_adapters import archived, docker_archive, oci_layout, tar_of


def parts_of(folder: Path) -> Files:
    return {name: path for name, path in archived(folder).items() if isinstance(path, Path) and is_part_of_image(name)}


def contents(parts: Files, scratch: Path) -> dict[str, bytes | None]:
    scratch.mkdir(exist_ok=True)
    found = files_of_image(parts, Scratch(scratch), "it", lambda name: name.startswith("data/"))
    return {
        name: None if path is None else path.read_bytes() for name, path in found.items() if name.startswith("data/")
    }


@pytest.mark.parametrize(
    ("layers", "expected"),
    [
        ([{"data/a": b"1", "etc/b": b"1"}], {"data/a": b"1"}),
        ([{"data/a": b"1", "data/b": b"1"}, {"data/a": b"2"}], {"data/a": b"2", "data/b": b"1"}),
        ([{"data/a": b"1", "data/b": b"1"}, {"data/.wh.a": b""}], {"data/b": b"1"}),
        ([{"data/a": b"1", "data/sub/b": b"1"}, {".wh.data": b"", "data/c": b"2"}], {"data/c": b"2"}),
        ([{"data/a": b"1"}, {"data/b": b"2", "data/.wh..wh..opq": b""}], {"data/b": b"2"}),
        ([{"data/ab": b"1"}, {"data/.wh.a": b""}], {"data/ab": b"1"}),
    ],
    ids=["one", "replaced", "removed", "folder removed", "emptied", "name that begins alike"],
)
def test_a_later_layer_lies_over_an_earlier_one(
    tmp_path: Path, layers: list[dict[str, bytes | Path]], expected: dict[str, bytes]
) -> None:
    oci_layout(tmp_path / "oci", [tar_of(layer, gzipped=True) for layer in layers])
    assert contents(parts_of(tmp_path / "oci"), tmp_path / "scratch") == expected


def test_a_link_in_the_place_of_a_file_is_none(tmp_path: Path) -> None:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as made:
        member = tarfile.TarInfo("data/a")
        member.type, member.linkname = tarfile.SYMTYPE, "/etc/passwd"
        made.addfile(member)
    oci_layout(tmp_path / "oci", [buffer.getvalue()])
    assert contents(parts_of(tmp_path / "oci"), tmp_path / "scratch") == {"data/a": None}


def test_an_index_of_an_index_and_a_signature_beside_it(tmp_path: Path) -> None:
    """As images of several platforms and with attestations are laid out."""
    first = oci_layout(tmp_path / "first", [tar_of({"data/a": b"1"})])
    inner = json.loads((first / "index.json").read_text())
    signature = inner["manifests"][0] | {"platform": {"architecture": "unknown", "os": "unknown"}}
    nested = tmp_path / "nested"
    oci_layout(nested, [tar_of({"data/a": b"1"})])
    data = json.dumps(inner | {"manifests": [*inner["manifests"], signature]}).encode()
    digest = hashlib.sha256(data).hexdigest()
    (nested / "blobs" / "sha256" / digest).write_bytes(data)
    (nested / "index.json").write_text(json.dumps({"manifests": [{"digest": f"sha256:{digest}"}]}))
    assert contents(parts_of(nested), tmp_path / "scratch") == {"data/a": b"1"}


def change_a_layer(folder: Path) -> None:
    largest = max((folder / "blobs" / "sha256").iterdir(), key=lambda path: path.stat().st_size)
    data = bytearray(largest.read_bytes())
    data[-1] ^= 1
    largest.write_bytes(bytes(data))


def write_index(value: object) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        (folder / "index.json").write_text(json.dumps(value))

    return change


def remove_blobs(folder: Path) -> None:
    for blob in (folder / "blobs" / "sha256").iterdir():
        blob.unlink()


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (change_a_layer, "was changed: its SHA-256 is"),
        (remove_blobs, "is missing or no regular file"),
        (write_index([]), "index.json holds no JSON object"),
        (write_index({}), "has no list of layers"),
        (write_index({"manifests": []}), "lists no image"),
        (write_index({"manifests": ["x"]}), "has no list of manifests"),
        (write_index({"manifests": [{"digest": "sha256:../../../../etc/passwd"}]}), "is no SHA-256 of a blob"),
        (write_index({"manifests": [{"digest": "md5:1"}]}), "is no SHA-256 of a blob"),
        (lambda folder: (folder / "index.json").write_text("{"), "not valid JSON"),
        (lambda folder: (folder / "index.json").unlink(), "index.json is missing"),
    ],
)
def test_a_broken_layout_is_refused(tmp_path: Path, change: Callable[[Path], None], reason: str) -> None:
    folder = oci_layout(tmp_path / "oci", [tar_of({"data/a": b"1"})])
    change(folder)
    with pytest.raises(VerificationError, match=reason):
        contents(parts_of(folder), tmp_path / "scratch")


def test_several_images_are_refused(tmp_path: Path) -> None:
    first, second = (oci_layout(tmp_path / name, [tar_of({"data/a": name.encode()})]) for name in ("one", "two"))
    listed = [json.loads((folder / "index.json").read_text())["manifests"][0] for folder in (first, second)]
    (first / "index.json").write_text(json.dumps({"manifests": listed}))
    parts = {**parts_of(second), **parts_of(first)}
    with pytest.raises(UsageError, match="holds 2 images; copy the one that is meant with `skopeo copy`"):
        contents(parts, tmp_path / "scratch")


@pytest.mark.parametrize("manifest", [b"[]", b"{}", b'[{"Layers": [1]}]', b'[{"Layers": ["../../etc/passwd"]}]', b"["])
def test_a_broken_image_of_docker_save_is_refused(tmp_path: Path, manifest: bytes) -> None:
    path = tmp_path / "manifest.json"
    path.write_bytes(manifest)
    with pytest.raises(VerificationError, match=r"lists no|is missing or no regular file|not valid JSON"):
        contents({"manifest.json": path}, tmp_path / "scratch")


def test_an_image_of_docker_save_is_read(tmp_path: Path) -> None:
    (tmp_path / "image.tar").write_bytes(docker_archive([tar_of({"data/a": b"1"}), tar_of({"data/b": b"2"})]))
    parts = Scratch(tmp_path).unpack(tmp_path / "image.tar", "it", is_part_of_image)
    assert contents(parts, tmp_path / "scratch") == {"data/a": b"1", "data/b": b"2"}


def test_many_manifests_are_refused(tmp_path: Path) -> None:
    folder = oci_layout(tmp_path / "oci", [tar_of({"data/a": b"1"})])
    index = json.loads((folder / "index.json").read_text())
    write_index({"manifests": index["manifests"] * 65})(folder)
    with pytest.raises(EdgetuneError, match="lists more than 64 manifests"):
        contents(parts_of(folder), tmp_path / "scratch")
