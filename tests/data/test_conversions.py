"""Whatever a record holds, a row becomes of it or a reason why not."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, get_args

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edgetune.config import FormName
from edgetune.data.conversions import converter_of
from edgetune.data.problems import RowError
from edgetune.data.rows import row_of
from edgetune.data.tool_calls import ModelTools, NoModel, ToolWriter
from support.chat_templates import BARE_TEMPLATES
from support.tokenizer_models import tokenizer_model

KEYS = [
    *(
        "messages",
        "conversations",
        "prompt",
        "completion",
        "text",
        "instruction",
        "input",
        "output",
        "history",
        "system",
    ),
    *("question", "answer", "tools", "functions", "label", "chosen", "rejected", "data"),
    *("role", "content", "from", "value", "weight", "loss_weight", "train", "name", "type", "text"),
    *("tool_calls", "function_call", "function", "arguments", "parameters"),
]
WORDS = [
    *("user", "assistant", "system", "tool", "human", "gpt", "function_call", "observation", "developer", "function"),
    *("text", "reasoning", "tool_call", "a", "[]", "[1]", "{}", '{"name": "a"}', '[{"role": "user"}]', "", " "),
]
# ONNX Runtime, wherever it ran before in the process, takes denormal numbers for zero.
VALUES = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-1, 2)
    | st.floats(allow_nan=False, allow_subnormal=False)
    | st.sampled_from(WORDS)
    | st.text(max_size=3),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(KEYS), inner, max_size=5),
    max_leaves=14,
)
TURNS = st.lists(
    st.fixed_dictionaries(
        {"role": st.sampled_from(WORDS[:10]), "content": st.sampled_from(WORDS) | VALUES},
        optional=dict.fromkeys(("weight", "tool_calls", "function_call", "tools", "name"), VALUES),
    )
    | st.fixed_dictionaries({"from": st.sampled_from(WORDS[:10]), "value": st.sampled_from(WORDS) | VALUES}),
    max_size=4,
)
ANY = VALUES | TURNS
RECORDS = st.one_of(
    st.dictionaries(st.sampled_from(KEYS), ANY, max_size=5),
    st.fixed_dictionaries(
        {"instruction": st.just("a") | ANY, "output": st.just("b") | ANY},
        optional=dict.fromkeys(("input", "history", "system"), ANY),
    ),
    st.fixed_dictionaries({"messages": TURNS}, optional=dict.fromkeys(("tools", "functions", "label"), ANY)),
    st.fixed_dictionaries({"conversations": TURNS}, optional=dict.fromkeys(("tools", "system"), ANY)),
    st.fixed_dictionaries({"prompt": ANY, "completion": ANY}, optional={"system": ANY}),
)
"""Anything, and what is nearly of each form."""


@pytest.fixture(scope="module")
def writers() -> list[ToolWriter]:
    encoder = tokenizer_model("bytes", BARE_TEMPLATES["dense"]).encoder
    model = ModelTools(encoder, Path("bundle"))
    model._calls = model._shows_results = True  # as of a model whose tokenizer knows the tokens of calls
    return [NoModel(), model]


@settings(max_examples=400, deadline=None)
@given(record=RECORDS, form=st.none() | st.sampled_from(get_args(FormName)), known=st.booleans())
def test_a_row_becomes_of_a_record_or_a_reason_is_given(
    writers: list[ToolWriter], record: dict[str, Any], form: FormName | None, known: bool
) -> None:
    try:
        made = converter_of(record, form, {}, writers[known]).row_of(record)
        row_of(made, 1)
    except RowError as error:
        assert str(error)
    else:
        assert row_of(json.loads(json.dumps(made)), 1) == row_of(made, 1)
        assert set(made) in ({"messages"}, {"prompt", "completion"}, {"text"})
