"""Cutting the frozen weights into files that a store takes. A tensor never spans two files."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from edgetune.errors import VerificationError
from edgetune.formats.storage import CHUNK
from edgetune.ship.external_data import Span

ALIGNMENT = 64
"""Bytes: a cache line, and the widest register. Runtimes use mapped weights where they lie."""


@dataclass(frozen=True)
class Shard:
    """One file of weights."""

    name: str
    starts: Mapping[Span, int]
    """Where each span of the bundle's files begins in this one."""

    @property
    def size(self) -> int:
        """Bytes of the file."""
        return max(start + span.length for span, start in self.starts.items())


def plan_shards(spans: Iterable[Span], limit: int) -> list[Shard]:
    """Put every byte that a span covers into a file, in the order in which they are stored.

    Args:
        spans: What the graphs refer to; several may name the same bytes, or overlap.
        limit: Bytes of a file; a single span that is larger gets a file of its own.
    """
    files: list[dict[Span, int]] = []
    end = 0
    for span in _joined(spans):
        start = -(-end // ALIGNMENT) * ALIGNMENT
        if not files or start + span.length > limit:
            files.append({})
            start = 0
        files[-1][span] = start
        end = start + span.length
    return [Shard(f"weights-{number:02}.bin", starts) for number, starts in enumerate(files)]


def moved(span: Span, shards: Iterable[Shard]) -> Span:
    """Where the bytes of a span lie now."""
    for shard in shards:
        for whole, start in shard.starts.items():
            if whole.file == span.file and whole.offset <= span.offset and span.end <= whole.end:
                return Span(shard.name, start + span.offset - whole.offset, span.length)
    raise ValueError(f"{span} is in no file of weights")


def write_shard(shard: Shard, source: Path, path: Path) -> None:
    """Copy the spans of a shard from the files in `source`.

    Raises:
        VerificationError: A span leads out of its file.
    """
    with path.open("wb") as target:
        for span, start in shard.starts.items():
            target.write(bytes(start - target.tell()))
            with (source / span.file).open("rb") as file:
                file.seek(span.offset)
                left = span.length
                while left and (data := file.read(min(left, CHUNK))):
                    target.write(data)
                    left -= len(data)
            if left:
                raise VerificationError(
                    f"{source / span.file}: a graph takes bytes {span.offset:,} to {span.end:,} from it, which it "
                    "does not have; make the bundle anew"
                )


def _joined(spans: Iterable[Span]) -> list[Span]:
    """Spans that share bytes become one."""
    joined: list[Span] = []
    for span in sorted(set(spans)):
        last = joined[-1] if joined else None
        if last is not None and last.file == span.file and span.offset < last.end:
            joined[-1] = Span(last.file, last.offset, max(last.end, span.end) - last.offset)
        else:
            joined.append(span)
    return joined
