"""Examples on disk are the examples that were stored, whoever reads them, and take little memory."""

from __future__ import annotations

import json
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest

from edgetune.data import stored_examples
from edgetune.data.encode import IGNORED, Example
from edgetune.data.stored_examples import ShortenedExamples, StoredExamples, held_bytes, longest, token_counts
from support.golden import GOLDEN


def drawn(count: int, most_tokens: int = 40) -> list[Example]:
    """Examples of all lengths, some of whose tokens are trained."""
    draw = np.random.default_rng(5)
    found = []
    for line in range(1, count + 1):
        ids = draw.integers(0, 2**31 - 1, draw.integers(1, most_tokens)).tolist()
        found.append(Example(line * 3, ids, [id if draw.random() < 0.4 else IGNORED for id in ids]))
    return found


def stored(examples: list[Example]) -> StoredExamples:
    store = StoredExamples()
    for example in examples:
        store.add(example)
    return store


@pytest.mark.parametrize("in_memory_bytes", [0, 1 << 20])
def test_examples_come_back_as_they_were(monkeypatch: pytest.MonkeyPatch, in_memory_bytes: int) -> None:
    monkeypatch.setattr(stored_examples, "IN_MEMORY_BYTES", in_memory_bytes or 1)
    examples = drawn(200)
    store = stored(examples)
    assert list(store) == examples
    assert store[7] == examples[7] and store[-1] == examples[-1] and store[3:9] == examples[3:9]
    assert token_counts(store).tolist() == token_counts(examples).tolist()
    assert longest(store) == max(len(example.input_ids) for example in examples)
    with pytest.raises(IndexError):
        store[200]
    more = Example(10**10, [5], [5])
    store.add(more)
    assert store[200] == more and store[0] == examples[0]


def test_threads_may_read_at_the_same_time() -> None:
    examples = drawn(300)
    store = stored(examples)
    with ThreadPoolExecutor(8) as pool:
        assert list(pool.map(store.__getitem__, [*range(300)] * 4)) == examples * 4


def test_shortened_examples_are_the_first_tokens() -> None:
    examples = drawn(50)
    cut = ShortenedExamples(stored(examples), 7)
    assert longest(cut) == 7
    assert [list(each.input_ids) for each in cut] == [list(each.input_ids[:7]) for each in examples]
    assert [list(each.labels) for each in cut[:5]] == [list(each.labels[:7]) for each in examples[:5]]
    assert token_counts(cut).tolist() == [min(7, len(each.input_ids)) for each in examples]


def test_memory_is_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    assert held_bytes(drawn(9)) == 0
    few, many = (held_bytes(stored(drawn(count, 9))) for count in (10, 1000))
    assert few < many < 100_000
    monkeypatch.setattr(stored_examples, "IN_MEMORY_BYTES", 64)
    assert held_bytes(stored(drawn(1000))) == 64 + 1000 * 20
    assert held_bytes(ShortenedExamples(stored(drawn(1000)), 3)) == 64 + 1000 * 20


LOAD = """
import sys
from pathlib import Path
from edgetune.data import stored_examples
from edgetune.data.encode import load_encoder
from edgetune.data.examples import load_examples
from edgetune.formats.bundle import load_bundle
from edgetune.training.record import peak_memory_bytes
stored_examples.IN_MEMORY_BYTES = 1 << 18
bundle = load_bundle(Path(sys.argv[1]))
encoder = load_encoder(bundle.path, bundle.manifest.tokenizer)
print(len(load_examples(Path(sys.argv[2]), encoder, 512, truncate=True).examples), peak_memory_bytes())
"""


@pytest.mark.skipif(sys.platform == "win32", reason="Windows tells no peak")
def test_a_large_file_takes_little_more_memory_than_a_small_one(tmp_path: Path) -> None:
    """A million tokens would take 8 MB as arrays, and 16 MB as lists at least."""
    words = " ".join(["turn", "the", "lamp", "on"] * 100)
    peaks = []
    for count in (40, 2000):
        file = tmp_path / f"{count}.jsonl"
        file.write_text("".join(f"{json.dumps({'text': f'{row} {words}'})}\n" for row in range(count)))
        command = [sys.executable, "-c", LOAD, str(GOLDEN / "bundle"), str(file)]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        rows, peak = map(int, done.stdout.split())
        assert rows == count
        peaks.append(peak)
    assert peaks[1] - peaks[0] < 3e6
