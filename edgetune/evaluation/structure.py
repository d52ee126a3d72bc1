"""Metrics of answers that hold data: named entities, or an object in JSON."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from typing import Any

from edgetune.evaluation.measurement import AnsweredRow, Measurement, f1, of_sums, texts

_FENCE = re.compile(r"\s*```\w*\n(.*?)\n?```\s*", re.DOTALL)
Entity = tuple[str, str]
"""Kind and text, without case."""


def entity_f1(rows: Sequence[AnsweredRow]) -> Measurement:
    """F1 of the entities of all answers together; kind and text have to agree."""
    counts = []
    for reference, answer in texts(rows):
        expected, answered = entities_in(reference) or Counter(), entities_in(answer) or Counter()
        counts.append(_agreement(answered, expected))
    return of_sums(counts, f1)


def entities_in(text: str) -> Counter[Entity] | None:
    """The entities of an answer.

    It is a list of objects with `type` and `text` in JSON, an object that has a text or a list of texts for each type,
    or lines `type: text`; `[]` and `{}` say that there are none.

    Returns:
        How often each occurs; None where the text is none of these.
    """
    pairs = list(_pairs(text))
    found = Counter((_plain(kind), _plain(name)) for kind, name in pairs if kind and name)
    return found if found.total() == len(pairs) else None


def _pairs(text: str) -> Iterator[tuple[str, str]]:
    """Kind and text of each entity, either of them empty where there is none."""
    value = _json_in(text)
    if isinstance(value, dict):
        for kind, held in value.items():
            for each in held if isinstance(held, list) else [held]:
                yield kind, each if isinstance(each, str) else ""
    elif isinstance(value, list):
        for each in value:
            kind, name = (each.get("type"), each.get("text")) if isinstance(each, dict) else ("", "")
            yield (kind, name) if isinstance(kind, str) and isinstance(name, str) else ("", "")
    elif value is not None or not text.strip():
        yield "", ""
    else:
        for line in filter(str.strip, text.splitlines()):
            kind, _, name = line.strip().removeprefix("-").removeprefix("*").partition(":")
            yield kind.strip(), name.strip()


def _plain(text: str) -> str:
    return " ".join(text.split()).casefold()


def json_match(rows: Sequence[AnsweredRow]) -> Measurement:
    """F1 of the keys and values of all answers together; an answer that is no JSON has none."""
    counts = []
    for reference, answer in texts(rows):
        expected, answered = leaves_in(reference) or Counter(), leaves_in(answer) or Counter()
        counts.append(_agreement(answered, expected))
    return of_sums(counts, f1)


def leaves_in(text: str) -> Counter[tuple[str, str]] | None:
    """Each value of an object or list in JSON that holds no others, with the keys that lead to it.

    Values of a list all have the same place, so that their order does not count.

    Returns:
        How often each pair of place and value occurs; None where the text is neither an object nor a list.
    """
    value = _json_in(text)
    try:
        return Counter(_leaves(value, "")) if isinstance(value, dict | list) else None
    except RecursionError:
        return None


def _leaves(value: Any, place: str) -> Iterator[tuple[str, str]]:
    if isinstance(value, dict) and value:
        for key, each in value.items():
            yield from _leaves(each, f"{place}.{json.dumps(key)}")
    elif isinstance(value, list) and value:
        for each in value:
            yield from _leaves(each, f"{place}[]")
    else:
        # 3 and 3.0 are one number, and true is none.
        whole = isinstance(value, float) and value.is_integer()
        yield place, json.dumps(int(value) if whole else value)


def _json_in(text: str) -> Any:
    """The JSON value that a text is, also between the fences of Markdown; None where it is none."""
    fenced = _FENCE.fullmatch(text)
    try:
        return json.loads(fenced[1] if fenced else text)
    except (ValueError, RecursionError):
        return None


def _agreement(answered: Counter[Any], expected: Counter[Any]) -> tuple[int, int, int]:
    return (answered & expected).total(), answered.total(), expected.total()
