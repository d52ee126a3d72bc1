"""Examples on disk, so that a file of rows takes little memory however large it is."""

from __future__ import annotations

from abc import abstractmethod
from array import array
from collections.abc import Sequence
from dataclasses import replace
from tempfile import SpooledTemporaryFile
from threading import Lock
from typing import overload

import numpy as np
from numpy.typing import NDArray

from edgetune.data.encode import IGNORED, Example

IN_MEMORY_BYTES = 16 << 20
"""What is stored stays in memory as long as it is no larger; then it goes to a file where temporary ones are kept."""
_LINE = np.dtype("<i8")
_ID = np.dtype("<i4")
_INDEX_BYTES = 8 + 4
"""Of an example, in memory: where it is, and how many tokens it has."""
_ORDER_BYTES = 8
"""Of an example, in memory: its place in the order of an epoch."""


class CountedExamples(Sequence[Example]):
    """Examples that are made when they are asked for, and whose lengths are known without it."""

    @property
    @abstractmethod
    def token_counts(self) -> NDArray[np.int32]:
        """(N,): the tokens of each example."""

    @property
    @abstractmethod
    def held_bytes(self) -> int:
        """What the examples and the order in which they are drawn take in memory."""

    @abstractmethod
    def _example(self, index: int) -> Example:
        """One of them. Raises IndexError where there is none."""

    @overload
    def __getitem__(self, index: int) -> Example: ...
    @overload
    def __getitem__(self, index: slice) -> list[Example]: ...
    def __getitem__(self, index: int | slice) -> Example | list[Example]:
        if isinstance(index, slice):
            return [self._example(at) for at in range(len(self))[index]]
        return self._example(index)


class StoredExamples(CountedExamples):
    """Examples in a private file without a name, which are read one by one when they are asked for.

    A record is the line of the row, its token ids, and a bit for each token that says whether it is trained. What was
    remarked on a row is not stored. Threads may use them at the same time.
    """

    def __init__(self) -> None:
        self._file = SpooledTemporaryFile(max_size=IN_MEMORY_BYTES)  # noqa: SIM115 - closed when nobody has it any more
        self._starts, self._counts = array("q"), array("i")
        self._size = 0
        self._using = Lock()

    def add(self, example: Example) -> None:
        """Store an example behind the others."""
        ids = np.asarray(example.input_ids, _ID)
        trained = np.packbits(np.asarray(example.labels) != IGNORED)
        record = np.asarray(example.line, _LINE).tobytes() + ids.tobytes() + trained.tobytes()
        with self._using:
            self._file.seek(self._size)
            self._file.write(record)
            self._starts.append(self._size)
            self._counts.append(len(ids))
            self._size += len(record)

    @property
    def token_counts(self) -> NDArray[np.int32]:
        """See `CountedExamples.token_counts`."""
        return np.array(self._counts, np.int32)

    @property
    def held_bytes(self) -> int:
        """See `CountedExamples.held_bytes`."""
        return len(self) * (_INDEX_BYTES + _ORDER_BYTES) + min(self._size, IN_MEMORY_BYTES)

    def __len__(self) -> int:
        return len(self._starts)

    def _example(self, index: int) -> Example:
        count = self._counts[index]
        size = _LINE.itemsize + count * _ID.itemsize + -(-count // 8)
        with self._using:
            self._file.seek(self._starts[index])
            record = self._file.read(size)
        ids = np.frombuffer(record, _ID, count, _LINE.itemsize)
        bits = np.frombuffer(record, np.uint8, offset=_LINE.itemsize + ids.nbytes)
        labels = np.where(np.unpackbits(bits, count=count), ids, _ID.type(IGNORED))
        return Example(int(np.frombuffer(record, _LINE, 1)[0]), ids.tolist(), labels.tolist())


class ShortenedExamples(CountedExamples):
    """The first tokens of examples, cut when they are asked for.

    Args:
        whole: The examples.
        length: Most tokens of each.
    """

    def __init__(self, whole: Sequence[Example], length: int) -> None:
        self._whole, self._length = whole, length

    @property
    def token_counts(self) -> NDArray[np.int32]:
        """See `CountedExamples.token_counts`."""
        return np.minimum(token_counts(self._whole), np.int32(self._length))

    @property
    def held_bytes(self) -> int:
        """See `CountedExamples.held_bytes`."""
        return held_bytes(self._whole)

    def __len__(self) -> int:
        return len(self._whole)

    def _example(self, index: int) -> Example:
        example = self._whole[index]
        return replace(example, input_ids=example.input_ids[: self._length], labels=example.labels[: self._length])


def token_counts(examples: Sequence[Example]) -> NDArray[np.int32]:
    """(N,): the tokens of each example, which those on disk need not be read for."""
    if isinstance(examples, CountedExamples):
        return examples.token_counts
    return np.array([len(example.input_ids) for example in examples], np.int32)


def longest(examples: Sequence[Example]) -> int:
    """The tokens of the longest example; 0 where there is none."""
    return int(token_counts(examples).max(initial=0))


def held_bytes(examples: Sequence[Example]) -> int:
    """What examples that were read from a file take in memory; a few that were made up count as nothing."""
    return examples.held_bytes if isinstance(examples, CountedExamples) else 0
