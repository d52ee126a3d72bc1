"""Entities and JSON in answers: every form that is taken, F1 by hand, and nervaluate as oracle."""

from __future__ import annotations

import json
from collections import Counter

import numpy as np
import pytest

from edgetune.evaluation.structure import entities_in, entity_f1, json_match, leaves_in
from support.answered import answered

LAMP_AND_TWO_ROOMS = Counter({("device", "lamp"): 1, ("room", "kitchen"): 1, ("room", "hall"): 1})


@pytest.mark.parametrize(
    "text",
    [
        '[{"type": "device", "text": "Lamp"}, {"type": "room", "text": "kitchen"}, {"type": "room", "text": "hall"}]',
        '{"device": "lamp", "room": ["kitchen", "hall"]}',
        "device: lamp\nroom: kitchen\nroom: hall",
        "- Device: lamp\n* room:  kitchen \n\n- room: Hall",
        '```json\n{"device": "lamp", "room": ["kitchen", "hall"]}\n```',
    ],
)
def test_the_forms_of_entities(text: str) -> None:
    assert entities_in(text) == LAMP_AND_TWO_ROOMS


@pytest.mark.parametrize("text", ["[]", "{}", '{"room": []}'])
def test_no_entities_can_be_said(text: str) -> None:
    assert entities_in(text) == Counter()


@pytest.mark.parametrize(
    "text", ["", "the lamp", '["lamp"]', '{"device": 3}', '[{"type": "device"}]', '"device: lamp"', "3"]
)
def test_what_holds_no_entities(text: str) -> None:
    assert entities_in(text) is None


def test_a_long_text_takes_no_long_time() -> None:
    """A row may have a megabyte: what tried every place of every blank would not come to an end."""
    blanks = "device" + " " * 500_000
    assert entities_in(blanks) is None
    assert entities_in(f"{blanks}: lamp") == Counter({("device", "lamp"): 1})
    assert entities_in("```\n" * 100_000) is None
    assert leaves_in("```\n" * 100_000) is None


def test_entity_f1_by_hand() -> None:
    rows = answered(
        ("device: lamp\nroom: hall", "device: lamp\nroom: cellar"),  # one of two
        ("device: fan", "nothing that could be read"),  # none of one
        ("[]", "[]"),  # nothing expected, nothing answered: right, and no count
    )
    # 1 agrees, 2 are answered, 3 expected: 2/5.
    assert entity_f1(rows).score == pytest.approx(2 / 5)
    assert entity_f1(rows).rows.tolist() == [0.5, 0.0, 1.0]


def test_entity_f1_is_nervaluates_strict_one() -> None:
    """An entity is a span there: one that is answered stands where the expected one of its text does, or elsewhere."""
    from nervaluate import Evaluator

    generator = np.random.default_rng(4)
    kinds, names = ["device", "room", "time"], ["lamp", "hall", "noon", "fan", "attic"]
    chosen: list[list[list[tuple[str, str]]]] = []
    for _ in range(40):
        places = generator.permutation(len(names))
        sides = [
            [(kinds[generator.integers(3)], names[place]) for place in places[: generator.integers(1, 5)]]
            for _ in range(2)
        ]
        chosen.append(sides)
    spans = [
        [
            [{"label": kind, "start": 10 * names.index(name), "end": 10 * names.index(name) + 4} for kind, name in side]
            for side in (row[number] for row in chosen)
        ]
        for number in (0, 1)
    ]
    oracle = Evaluator(spans[0], spans[1], tags=kinds, loader="dict").evaluate()["overall"]["strict"]
    texts = [tuple(json.dumps([{"type": kind, "text": name} for kind, name in side]) for side in row) for row in chosen]
    assert 0.1 < oracle.f1 < 0.9
    assert entity_f1(answered(*[(one, other) for one, other in texts])).score == pytest.approx(oracle.f1)


def test_leaves_have_the_keys_that_lead_to_them() -> None:
    found = leaves_in('{"a": {"b": 1.0, "c": [true, "x", "x"]}, "d": {}}')
    assert found == Counter(
        {('."a"."b"', "1"): 1, ('."a"."c"[]', "true"): 1, ('."a"."c"[]', '"x"'): 2, ('."d"', "{}"): 1}
    )
    assert leaves_in('"text"') is None
    assert leaves_in("{") is None
    assert leaves_in("[" * 900 + "]" * 900) in (None, Counter({("[]" * 899, "[]"): 1}))


def test_json_match_by_hand() -> None:
    rows = answered(
        ('{"intent": "dim", "level": 30}', '{"level": 30.0, "intent": "dim"}'),  # the same: 2 of 2
        ('{"intent": "dim", "level": 30}', '{"intent": "dim", "level": "30"}'),  # a text is no number: 1 of 2
        ('{"rooms": ["hall", "attic"]}', '{"rooms": ["attic", "hall", "cellar"]}'),  # 2 of 2, and one too many
        ('{"intent": "stop"}', "stop"),  # 0 of 1
    )
    # 5 agree, 7 are answered, 7 expected.
    assert json_match(rows).score == pytest.approx(10 / 14)
    assert json_match(rows).rows.tolist() == pytest.approx([1.0, 0.5, 0.8, 0.0])
