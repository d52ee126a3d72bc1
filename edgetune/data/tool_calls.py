"""Tools that a model may call, and its calls, in the words that the model was taught with.

A model is told of tools in its system's turn, where its chat template has a place for them, as a JSON list of what
`tools` of the system's message says; it calls them as a JSON list between two control tokens, and is told what came of
it in a turn of the role `tool`. Phi-4-mini does so (its model card, section "Tool-enabled function-calling format");
the models before it know no tools.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Protocol

from edgetune.data.encode import Encoder
from edgetune.data.problems import FormError, RowError, kind_of, quoted
from edgetune.data.rows import Message
from edgetune.errors import DataError, IncompatibleError

CALL, CALL_END = "<|tool_call|>", "<|/tool_call|>"
"""What a call stands between."""
_MARK = "edgetune-probe"
_ADVICE = "remove them, or take a model that was taught to call tools, such as Phi-4-mini"


class ToolWriter(Protocol):
    """Writes tools and calls as a model has them."""

    def tools(self, value: Any) -> str:
        """What the system's message says of the tools.

        Raises:
            FormError: The model has no place for tools.
            RowError: It is no list of tools.
        """

    def calls(self, calls: list[Any]) -> str:
        """What an answer says that calls tools.

        Raises:
            FormError: The model does not call tools.
            RowError: One of them is no call.
        """

    def require_results(self) -> None:
        """See that the model is shown what came of a call.

        Raises:
            FormError: It is not.
        """


class NoModel:
    """Writes nothing, because nobody said which model it is for."""

    def tools(self, value: Any) -> str:
        """As `ToolWriter` says."""
        raise _unknown("tools")

    def calls(self, calls: list[Any]) -> str:
        """As `ToolWriter` says."""
        raise _unknown("tool calls")

    def require_results(self) -> None:
        """As `ToolWriter` says."""
        raise _unknown("results of tools")


class ModelTools:
    """Writes for the model of a bundle.

    Args:
        encoder: The bundle's.
        bundle: What messages call it.
    """

    def __init__(self, encoder: Encoder, bundle: Path) -> None:
        self._bundle = bundle
        system, question = Message("system", "", tools=_MARK), Message("user", "?")
        self._shows_tools = _MARK in _rendered(encoder, system, question)
        self._shows_results = _MARK in _rendered(encoder, question, Message("tool", _MARK))
        self._calls = all(encoder.knows_token(token) for token in (CALL, CALL_END))

    def tools(self, value: Any) -> str:
        """As `ToolWriter` says."""
        if not self._shows_tools:
            raise FormError(f"has tools, which the chat template of {self._bundle} leaves out", advice=_ADVICE)
        tools = _parsed("tools", value)
        if not isinstance(tools, list) or not all(isinstance(tool, dict) for tool in tools):
            raise RowError(f"tools must be a list of objects, found {kind_of(tools)}")
        return _json([tool["function"] if isinstance(tool.get("function"), dict) else tool for tool in tools])

    def calls(self, calls: list[Any]) -> str:
        """As `ToolWriter` says."""
        if not self._calls:
            raise FormError(f"has tool calls, and the tokenizer of {self._bundle} has no {CALL}", advice=_ADVICE)
        return CALL + _json([_call(call) for call in calls]) + CALL_END

    def require_results(self) -> None:
        """As `ToolWriter` says."""
        if not self._shows_results:
            what = f"has results of tools, which the chat template of {self._bundle} leaves out"
            raise FormError(what, advice=_ADVICE)


def _call(value: Any) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise RowError(f"a tool call must be an object, found {kind_of(value)}")
    call = value["function"] if isinstance(value.get("function"), dict) else value
    name = call.get("name")
    if not isinstance(name, str) or not name:
        raise RowError(f'a tool call must have a "name", found {kind_of(name)}')
    return {"name": name, "arguments": _parsed(f"the arguments of the tool call {quoted(name)}", call.get("arguments"))}


def _parsed(what: str, value: Any) -> Any:
    """JSON that may be written as a string in JSON, as OpenAI has it."""
    if not isinstance(value, str):
        return {} if value is None else value
    try:
        return json.loads(value) if value.strip() else {}
    except (ValueError, RecursionError) as error:
        raise RowError(f"{what} must be JSON, found {quoted(value)}") from error


def _json(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False)


def _rendered(encoder: Encoder, *messages: Message) -> str:
    """A conversation as the model is shown it; nothing where its template takes no such conversation."""
    if encoder.template is None:
        return ""
    try:
        return encoder.template.render(messages, add_generation_prompt=True)
    except (DataError, IncompatibleError):
        return ""


def _unknown(what: str) -> FormError:
    return FormError(
        f"has {what}, which each model has in its own words",
        advice="say with --bundle BUNDLE for which model they are to be written",
    )
