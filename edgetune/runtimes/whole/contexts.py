"""Compiled contexts: what an accelerator's compiler made, kept beside the bundle and verified before it is used.

    BUNDLE/.cache/contexts/KEY/compiled       what the compiler gave, one file that names no other
    BUNDLE/.cache/contexts/KEY/record.json    its key in words, the placement of the graph, SHA-256 of both

KEY is the SHA-256 of everything that the compiler's work depends on. `.cache` is no part of the bundle and can be
deleted at any time. The hash finds damage, not forgery; `ep_context` refuses what would lead elsewhere.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path

import cattrs
from cattrs.errors import BaseValidationError

from edgetune.errors import EdgetuneError, VerificationError
from edgetune.formats.json_file import read_object
from edgetune.formats.manifest import BundleManifest
from edgetune.formats.storage import atomic_folder, write_file
from edgetune.runtimes.placement import Partition
from edgetune.runtimes.verified_cache import CACHE

_CONTEXTS = "contexts"
_COMPILED, _RECORD = "compiled", "record.json"
_MOST_BYTES = 1 << 30
"""Of contexts that are kept, the youngest ones: that of a whole step holds the frozen weights."""
_LEAST_KEPT = 4
"""However large they are."""
_LOWERING = 2
"""Version of what edgetune's compilers make of a graph before it is compiled; a change there is a change here."""
_WEIGHT, _GRAPH = 5, 1_000_000
"""Bytes of a frozen weight in a context and of all else: more than OpenVINO's CPU takes, which keeps float32."""


@dataclass(frozen=True)
class ContextKey:
    """All that a compiled context depends on. The adapter is an input of the graph and not among it."""

    runtime: str
    """Packages and versions."""
    device: str
    """What it was compiled for."""
    graph: str
    """SHA-256 of the ONNX file."""
    weights: str
    """SHA-256 of the frozen weights."""
    batch: int
    length: int
    options: dict[str, str]
    """Of the compiler and the session."""
    lowering: int = _LOWERING

    @classmethod
    def of(
        cls,
        manifest: BundleManifest,
        role: str,
        batch: int,
        length: int,
        *,
        runtime: str,
        device: str,
        options: dict[str, str],
    ) -> ContextKey:
        """The key of a bundle's graph, with the hashes of its manifest."""
        hashes = {file.path: file.sha256 for file in manifest.files}
        weights = ",".join(digest for name, digest in sorted(hashes.items()) if name.endswith(".data"))
        return cls(runtime, device, hashes[manifest.graph(role).file], weights, batch, length, options)

    @property
    def digest(self) -> str:
        """SHA-256 of the key in canonical JSON."""
        return hashlib.sha256(json.dumps(asdict(self), sort_keys=True).encode()).hexdigest()


@dataclass(frozen=True)
class _Record:
    key: ContextKey
    sha256: str
    """Of the compiled bytes, followed by the partitions in JSON."""
    partitions: list[Partition]


@dataclass(frozen=True)
class Context:
    """A verified context."""

    data: bytes
    partitions: list[Partition]
    """Where the nodes of the graph were put when it was compiled."""


class ContextStore:
    """The contexts of a bundle.

    Args:
        bundle: Its folder.
    """

    def __init__(self, bundle: Path) -> None:
        self._folder = bundle / CACHE / _CONTEXTS

    def load(self, key: ContextKey) -> Context | None:
        """A context whose bytes are those that were saved; one that is damaged is removed and counts as none.

        The bytes that are hashed are the bytes that are returned: nothing is read again afterwards.
        """
        folder = self._folder / key.digest
        try:
            record = _read_record(folder / _RECORD)
            data = (folder / _COMPILED).read_bytes() if _is_plain(folder / _COMPILED) else b""
        except FileNotFoundError:
            return None
        except (OSError, VerificationError, BaseValidationError):
            record, data = None, b""
        if record is None or record.key != key or record.sha256 != _sealed(data, record.partitions):
            with suppress(OSError):
                shutil.rmtree(folder)
            return None
        return Context(data, record.partitions)

    def save(self, key: ContextKey, data: bytes, partitions: list[Partition]) -> None:
        """Keep a context for the next start; where nothing can be written, or someone else writes it, none is kept."""
        record = _Record(key, _sealed(data, partitions), partitions)
        with suppress(OSError, EdgetuneError), atomic_folder(self._folder / key.digest, replace=True) as folder:
            write_file(folder / _COMPILED, data)
            write_file(folder / _RECORD, json.dumps(_converter.unstructure(record), indent=1).encode())
        with suppress(OSError):
            self._drop_old()

    def _drop_old(self) -> None:
        found = []
        for path in self._folder.iterdir():
            if path.name.startswith("."):
                continue  # a lock, or what another process writes
            try:
                found.append(((path / _RECORD).stat().st_mtime, (path / _COMPILED).stat().st_size, path))
            except OSError:
                shutil.rmtree(path, ignore_errors=True)
        total = 0
        for number, (_, size, path) in enumerate(sorted(found, reverse=True)):
            total += size
            if number >= _LEAST_KEPT and total > _MOST_BYTES:
                shutil.rmtree(path, ignore_errors=True)


def most_context_bytes(weights: int, graphs: int) -> int:
    """Bytes that the contexts of a run may take: each has the frozen weights.

    Args:
        weights: Frozen ones of the model.
        graphs: That are compiled, one for each role and shape.
    """
    each = _WEIGHT * weights + _GRAPH
    return min(graphs * each, max(_LEAST_KEPT * each, _MOST_BYTES))


_converter = cattrs.Converter(forbid_extra_keys=True)


def _sealed(data: bytes, partitions: list[Partition]) -> str:
    digest = hashlib.sha256(data)
    digest.update(json.dumps(_converter.unstructure(partitions)).encode())
    return digest.hexdigest()


def _read_record(path: Path) -> _Record:
    fix = "it is made anew"
    if not _is_plain(path):
        raise VerificationError(f"{path}: expected a file; {fix}")
    record: _Record = _converter.structure(read_object(path, fix), _Record)
    return record


def _is_plain(path: Path) -> bool:
    """A regular file; a link would lead elsewhere."""
    if not path.exists():
        raise FileNotFoundError(path)
    return path.is_file() and not path.is_symlink()
