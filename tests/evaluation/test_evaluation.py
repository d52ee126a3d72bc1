"""Evaluation through ONNX Runtime against the same figures computed in numpy."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest

from edgetune.config import EvaluateConfig
from edgetune.errors import DataError, IncompatibleError, UsageError
from edgetune.evaluation import Evaluation, evaluate, measure
from edgetune.formats.adapter import write_adapter
from edgetune.formats.bundle import Bundle
from edgetune.formats.manifest import BaseModel
from support.tiny_bundle import BASE_LOGITS, LORA, MAX_LENGTH, SLOT, WORDS, make_bundle, some_rows, write_rows


@pytest.fixture
def bundle(tmp_path: Path) -> Bundle:
    return make_bundle(tmp_path / "bundle")


def parameters(seed: int) -> dict[str, np.ndarray]:
    generator = np.random.default_rng(seed)
    return {name: generator.normal(size=shape).astype(np.float32) * 0.5 for name, shape in LORA.shapes().items()}


def write(folder: Path, bundle: Bundle, values: dict[str, np.ndarray], base: BaseModel | None = None) -> Path:
    folder.mkdir()
    manifest = bundle.manifest
    write_adapter(
        folder,
        base=base or manifest.base,
        tokenizer=manifest.tokenizer,
        lora=manifest.lora,
        parameters=values,
        provenance={},
    )
    return folder


def by_hand(rows: list[dict[str, str]], table: np.ndarray) -> Evaluation:
    """Word by word, without batches, padding or ONNX."""
    losses: list[float] = []
    hits: list[bool] = []
    exact = 0
    for row in rows:
        ids = [WORDS.index(word) for word in (row["prompt"] + row["completion"]).split()] + [WORDS.index("<eos>")]
        row_hits = []
        for seen, target in pairwise(ids):
            logits = table[seen].astype(np.float64)
            losses.append(float(np.log(np.exp(logits).sum()) - logits[target]))
            row_hits.append(int(logits.argmax()) == target)
        hits += row_hits
        exact += all(row_hits)
    mean = float(np.mean(losses))
    return Evaluation(len(rows), 0, len(losses), mean, float(np.exp(mean)), float(np.mean(hits)), exact / len(rows))


def assert_close(found: Evaluation, expected: Evaluation) -> None:
    assert (found.rows, found.left_out, found.trained_tokens) == (
        expected.rows,
        expected.left_out,
        expected.trained_tokens,
    )
    for name in ("loss", "perplexity", "token_accuracy", "exact_match"):
        assert getattr(found, name) == pytest.approx(getattr(expected, name), rel=1e-5), name


def test_the_base_alone(bundle: Bundle, tmp_path: Path) -> None:
    rows = some_rows(9)
    data = write_rows(tmp_path / "data.jsonl", rows)
    assert_close(evaluate(bundle.path, data), by_hand(rows, BASE_LOGITS))


def test_base_and_adapter(bundle: Bundle, tmp_path: Path) -> None:
    values, rows = parameters(1), some_rows(7)
    data = write_rows(tmp_path / "data.jsonl", rows)
    adapter = write(tmp_path / "adapter", bundle, values)
    table = BASE_LOGITS + LORA.scaling_of(SLOT.module) * (values[SLOT.b] @ values[SLOT.a]).T
    expected = by_hand(rows, table)
    assert expected.loss != pytest.approx(by_hand(rows, BASE_LOGITS).loss, rel=1e-2)
    assert expected.token_accuracy > 0
    assert_close(evaluate(bundle.path, data, adapter=adapter), expected)


def test_rows_that_are_given_exactly(bundle: Bundle, tmp_path: Path) -> None:
    # B·A makes a, b, c, end of sequence by far the most probable chain; two rows follow it to its end.
    letters = [WORDS.index(letter) for letter in "abc"]
    a, b = np.zeros(LORA.shapes()[SLOT.a], np.float32), np.zeros(LORA.shapes()[SLOT.b], np.float32)
    for rank, (seen, target) in enumerate(zip(letters, [*letters[1:], WORDS.index("<eos>")], strict=True)):
        a[rank, seen] = 5.0
        b[target, rank] = 5.0
    rows = [
        {"prompt": "a", "completion": " b c"},
        {"prompt": "b", "completion": " c"},
        {"prompt": "a", "completion": " c"},
        {"prompt": "c", "completion": " a a a a a a"},
    ]
    data = write_rows(tmp_path / "data.jsonl", rows)
    adapter = write(tmp_path / "adapter", bundle, {SLOT.a: a, SLOT.b: b})
    found = evaluate(bundle.path, data, adapter=adapter)
    assert found.exact_match == 0.5
    assert_close(found, by_hand(rows, BASE_LOGITS + LORA.scaling_of(SLOT.module) * (b @ a).T))


def test_the_order_of_rows_does_not_matter(bundle: Bundle, tmp_path: Path) -> None:
    rows = some_rows(9)
    forward = evaluate(bundle.path, write_rows(tmp_path / "a.jsonl", rows))
    backward = evaluate(bundle.path, write_rows(tmp_path / "b.jsonl", rows[::-1]))
    assert forward.loss == pytest.approx(backward.loss, rel=1e-6)
    assert forward.exact_match == backward.exact_match


def test_long_rows_are_left_out_and_counted(bundle: Bundle, tmp_path: Path) -> None:
    rows = some_rows(3)
    data = write_rows(tmp_path / "data.jsonl", [*rows, {"prompt": "a", "completion": " b" * MAX_LENGTH}])
    found = evaluate(bundle.path, data)
    assert (found.rows, found.left_out) == (3, 1)
    assert found.loss == pytest.approx(by_hand(rows, BASE_LOGITS).loss, rel=1e-5)


def test_long_rows_are_cut_where_that_is_asked_for(bundle: Bundle, tmp_path: Path) -> None:
    long = {"prompt": "a", "completion": " b" * MAX_LENGTH}
    found = evaluate(bundle.path, write_rows(tmp_path / "data.jsonl", [long]), EvaluateConfig(truncate=True))
    assert (found.rows, found.left_out, found.trained_tokens) == (1, 0, MAX_LENGTH - 1)
    with pytest.raises(DataError, match="cut them with --truncate"):
        evaluate(bundle.path, tmp_path / "data.jsonl")


def test_rows_that_are_loaded_already(bundle: Bundle, tmp_path: Path) -> None:
    from edgetune.data.encode import load_encoder
    from edgetune.data.examples import load_examples

    data = write_rows(tmp_path / "data.jsonl", some_rows(5))
    examples = load_examples(data, load_encoder(bundle.path, bundle.manifest.tokenizer), MAX_LENGTH, truncate=False)
    assert measure(bundle, examples.examples, None) == evaluate(bundle.path, data)


def test_what_does_not_fit_is_refused(bundle: Bundle, tmp_path: Path) -> None:
    data = write_rows(tmp_path / "data.jsonl", some_rows(2))
    with pytest.raises(UsageError, match="no adapter here"):
        evaluate(bundle.path, data, adapter=tmp_path)
    adapter = write(tmp_path / "adapter", bundle, parameters(0), BaseModel("another", "c" * 64, "fp32"))
    with pytest.raises(IncompatibleError, match=r"trained on another .*bundle holds bigram"):
        evaluate(bundle.path, data, adapter=adapter)
