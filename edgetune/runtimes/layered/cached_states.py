"""What enters the lowest trained layer, kept on disk: of a row it is the same in every epoch.

It is kept in 16 bits, and what was just computed is rounded to them as well, so that a row gives the same bytes whether
it is computed or read. The file begins with what it is of:

    8 bytes     `ETSTATES`
    32 bytes    SHA-256 of the bundle and of all of the plan that decides what the states are

and then has a record for each row:

    4 bytes     `ROW` and a zero
    32 bytes    SHA-256 of the row's token ids and of its rotary tables
    4 bytes     its number of positions, little-endian
    32 bytes    SHA-256 of all else in the record
    positions · 2 bytes                 exponents of the powers of two, int16
    positions · hidden_size · 2 bytes   float16

What a process that died left unfinished, and all that comes after a record that is none, is cut off; a row whose
numbers are not those that were written is computed again.
"""

from __future__ import annotations

import hashlib
import io
import struct
import tempfile
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from edgetune.data.batches import MASKED, Batch, Borrowed
from edgetune.data.encode import IGNORED
from edgetune.machine.disk import free_bytes
from edgetune.runtimes.execution import KeptStates
from edgetune.runtimes.layered.workspace import Halves
from edgetune.text.byte_size import bytes_text

FILE = "lower-states"
_KIND = b"ETSTATES"
_MARK = b"ROW\0"
_HEAD = struct.Struct("<4s32sI32s")
_EXPONENT, _HALF = np.dtype("<i2"), np.dtype("<f2")
Floats = NDArray[np.float32]
Places = tuple[NDArray[np.intp], NDArray[np.intp]]
"""Sequences, and positions in them."""
Compute = Callable[[Sequence[int]], Floats]


def record_bytes(positions: int, hidden_size: int) -> int:
    """Bytes that a row of so many positions takes."""
    return _HEAD.size + positions * (_EXPONENT.itemsize + hidden_size * _HALF.itemsize)


class LowerStates:
    """States of rows, by what the rows are.

    Args:
        use: How much may be kept, and where.
        made_by: All that decides what the states are, beside the rows.
        hidden_size: Numbers of a position.
    """

    def __init__(self, use: KeptStates, made_by: str, hidden_size: int) -> None:
        self._use, self._hidden_size = use, hidden_size
        self._rows: dict[bytes, tuple[int, int]] = {}
        """Where a row's record begins, and its number of positions."""
        self._refused: set[bytes] = set()
        """Rows that came, and for which there was no room."""
        self._notices: list[str] = []
        self._start = _KIND + hashlib.sha256(made_by.encode()).digest()
        self._end = len(self._start)
        self._place = Path(tempfile.gettempdir()) if use.folder is None else use.folder
        self._file: io.FileIO | None = None
        self._takes_more = True
        try:
            self._file = self._open() if use.most_bytes else None
        except OSError as error:
            self._stop(error.strerror or str(error))

    @property
    def complete(self) -> bool:
        """Whether every row of the run is there."""
        return len(self._rows) >= self._use.rows

    def take(self, batch: Batch, compute: Compute) -> list[tuple[Places, Halves]]:
        """What enters the layer: where each row lies, and its states.

        Args:
            batch: Its rows are looked up.
            compute: Called where a row is not there, with the numbers of rows in the batch: all of them, or those that
                are not there and will not be. Gives (sequences, positions, hidden_size) that are right for them.
        """
        places = [batch.places(row) for row in range(len(batch.examples))]
        keys = [_key(batch, each) for each in places]
        found = {key: self._read(key) for key in keys}
        if missing := [row for row, key in enumerate(keys) if found[key] is None]:
            # The batch in which a row comes first is always computed as a whole: one that goes on after a kill, and
            # has lost some of its rows, comes to the same numbers.
            seen = all(keys[row] in self._refused for row in missing)
            # Rows that share a prefix would each have one of their own, and take more memory than the pass has.
            alone = seen and not any(borrowed.tokens for borrowed in batch.borrowed)
            computed = compute(missing if alone else range(len(keys)))
            for row in missing:
                # Of rows that are alike the first counts: later they are all read as this one.
                if found[keys[row]] is None:
                    found[keys[row]] = halves = Halves.of(computed[places[row]])
                    self._keep(keys[row], halves)
        return [(place, kept) for place, key in zip(places, keys, strict=True) if (kept := found[key]) is not None]

    def notices(self) -> list[str]:
        """What is to be said since this was asked last."""
        said, self._notices = self._notices, []
        return said

    def close(self) -> None:
        """Let the file go; nothing is kept any more."""
        if self._file is not None:
            self._file.close()
            self._file = None
        self._rows.clear()

    def _open(self) -> io.FileIO:
        if self._use.folder is None:
            file: io.FileIO = tempfile.TemporaryFile("w+b", buffering=0)  # noqa: SIM115 (it stays open)
        else:
            self._use.folder.mkdir(exist_ok=True)
            path = self._use.folder / FILE
            path.touch()
            file = path.open("r+b", buffering=0)
        if file.read(len(self._start)) == self._start:
            self._find_rows(file)
        else:
            file.seek(0)
            file.write(self._start)
        # A record that is none, and what comes after it: nothing says where the next one begins.
        file.truncate(self._end)
        return file

    def _find_rows(self, file: io.FileIO) -> None:
        size = file.seek(0, 2)
        while True:
            file.seek(self._end)
            head = file.read(_HEAD.size)
            if len(head) < _HEAD.size:
                return
            mark, key, positions, _ = _HEAD.unpack(head)
            end = self._end + record_bytes(positions, self._hidden_size)
            if mark != _MARK or end > size:
                return
            self._rows[key] = self._end, positions
            self._end = end

    def _read(self, key: bytes) -> Halves | None:
        """A row's states; none where it has none that are as they were written."""
        if self._file is None or key not in self._rows:
            return None
        offset, positions = self._rows[key]
        record = bytearray(record_bytes(positions, self._hidden_size))
        try:
            self._file.seek(offset)
            whole = self._file.readinto(record) == len(record)
        except OSError:
            return None
        numbers = memoryview(record)[_HEAD.size :]
        if not whole or record[: _HEAD.size] != self._head(key, positions, numbers):
            return None
        exponents = np.frombuffer(numbers, _EXPONENT, positions).astype(np.int32)
        halves = np.frombuffer(numbers, _HALF, offset=exponents.size * _EXPONENT.itemsize)
        return Halves(halves.reshape(positions, self._hidden_size), exponents[:, None])

    def _keep(self, key: bytes, states: Halves) -> None:
        """Write a row's record while there is room: where it was, if it is damaged, and else behind the others."""
        self._refused.add(key)
        if self._file is None or not self._takes_more:
            return
        positions = len(states.numbers)
        offset, _ = self._rows.get(key, (self._end, positions))
        end = offset + record_bytes(positions, self._hidden_size)
        if end > self._end and end - len(self._start) > self._use.most_bytes:
            return
        numbers = states.exponents.astype(_EXPONENT).tobytes() + states.numbers.astype(_HALF, copy=False).tobytes()
        record = self._head(key, positions, numbers) + numbers
        try:
            free = free_bytes(self._place)
            if end > self._end and free < len(record) + self._use.spare_bytes:
                self._stop(f"{self._place} has {bytes_text(free)} left, which others may need")
                return
            self._file.seek(offset)
            rest = memoryview(record)
            while rest:
                rest = rest[self._file.write(rest) :]
        except OSError as error:
            with suppress(OSError):
                self._file.truncate(self._end)
            self._stop(error.strerror or str(error))
            return
        self._refused.discard(key)
        self._rows[key] = offset, positions
        self._end = max(self._end, end)

    def _stop(self, reason: str) -> None:
        """Say why no more is kept."""
        self._takes_more = False
        self._notices.append(
            f"what enters the lowest trained layer is kept of {len(self._rows):,} rows and no more ({reason}): of the "
            "others it is computed in every epoch, and the training goes on"
        )

    def _head(self, key: bytes, positions: int, numbers: bytes | memoryview) -> bytes:
        what = hashlib.sha256(key + positions.to_bytes(4, "little"))
        what.update(numbers)
        return _HEAD.pack(_MARK, key, positions, what.digest())


def rows_alone(batch: Batch, rows: Sequence[int]) -> tuple[Batch, list[Places]]:
    """Some rows of a batch in as few sequences as they fit into.

    Args:
        batch: Its labels have no meaning for what is returned.
        rows: At least one.

    Returns:
        The rows in a batch of their own, and where each of them lies in it.
    """
    used: list[int] = []
    taken, places = [batch.places(row) for row in rows], []
    for _, positions in taken:
        count = len(positions)
        fits = (number for number, length in enumerate(used) if length + count <= batch.input_ids.shape[1])
        sequence = next(fits, len(used))
        used += [0] * (sequence == len(used))
        places.append((np.full(count, sequence), np.arange(used[sequence], used[sequence] + count)))
        used[sequence] += count
    shape = len(used), max(used)
    ids, numbers = np.zeros(shape, np.int64), np.full(shape, -1, np.int64)
    bias = np.full((shape[0], 1, shape[1], shape[1]), MASKED)
    cos, sin = (np.zeros((*shape, table.shape[2]), np.float32) for table in (batch.rope_cos, batch.rope_sin))
    for number, (before, now) in enumerate(zip(taken, places, strict=True)):
        ids[now], numbers[now] = batch.input_ids[before], number
        cos[now], sin[now] = batch.rope_cos[before], batch.rope_sin[before]
        seen = batch.attn_bias[before[0][0], 0][np.ix_(before[1], before[1])]
        bias[now[0][0], 0][np.ix_(now[1], now[1])] = seen
    examples = tuple(batch.examples[row] for row in rows)
    alone = Batch(
        input_ids=ids,
        labels=np.full(shape, IGNORED),
        attn_bias=bias,
        rope_cos=cos,
        rope_sin=sin,
        rows=numbers,
        examples=examples,
        borrowed=tuple(Borrowed(number, 0) for number in range(len(rows))),
        tokens=sum(used),
        trained_tokens=0,
    )
    return alone, places


def _key(batch: Batch, places: Places) -> bytes:
    """What a row's states depend on: with longrope, its tables depend on what it is laid out with."""
    arrays = (batch.input_ids, batch.rope_cos, batch.rope_sin)
    return hashlib.sha256(b"".join(array[places].tobytes() for array in arrays)).digest()
