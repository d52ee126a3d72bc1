"""A record of any known form as a row of edgetune: conversations of OpenAI, TRL and ShareGPT, Alpaca, columns, text."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from edgetune.config import FormName
from edgetune.data.forms import (
    COMPLETION_NAMES,
    CONVERSATIONS,
    PROMPT_NAMES,
    SYSTEM_NAMES,
    conversation_key,
    guess_columns,
    is_alpaca,
    refuse_preference,
)
from edgetune.data.problems import FormError, RowError, kind_of, quoted
from edgetune.data.rows import CALLS, TOOLS
from edgetune.data.tool_calls import NoModel, ToolWriter

FORMS: dict[FormName, str] = {
    "messages": "conversations (messages)",
    "sharegpt": "ShareGPT conversations",
    "alpaca": "Alpaca rows",
    "prompt-completion": "prompts and completions",
    "text": "texts",
}
"""The forms that are converted, and how messages call them."""
_ROLES = {
    **dict.fromkeys(("system", "developer"), "system"),
    **dict.fromkeys(("user", "human", "prompter"), "user"),
    **dict.fromkeys(("assistant", "gpt", "chatgpt", "bot", "model", "bing", "bard", "function_call"), "assistant"),
    **dict.fromkeys(("tool", "function", "observation", "function_response", "tool_response"), "tool"),
}
"""What the roles are called elsewhere."""
_NO_ANSWER = ("reasoning", "thinking")
"""Content that an answer does not consist of."""


@dataclass(frozen=True)
class Columns:
    """Which fields of a record are what."""

    prompt: str
    completion: str
    system: str | None


@dataclass
class Converter:
    """Makes rows of records of one form.

    Args:
        form: What the records are.
        columns: For prompts and completions, which fields they are.
        writer: Writes tools and their calls.
    """

    form: FormName
    columns: Columns | None = None
    writer: ToolWriter = field(default_factory=NoModel)
    left_out: set[str] = field(default_factory=set)
    """Names of fields that no row has any more."""

    def row_of(self, record: Any) -> dict[str, Any]:
        """The row of a record, as it is to be written; `rows.row_of` says whether it can be trained on.

        Raises:
            FormError: What it holds cannot be converted, and neither can what other records of its kind hold.
            RowError: Something is missing in it, or is of the wrong kind.
        """
        if not isinstance(record, dict):
            raise RowError(f"expected an object, found {kind_of(record)}")
        refuse_preference(record)
        make: Mapping[FormName, Callable[[dict[str, Any]], dict[str, Any]]] = {
            "messages": self._of_messages,
            "sharegpt": self._of_sharegpt,
            "alpaca": self._of_alpaca,
            "prompt-completion": self._of_columns,
            "text": self._of_text,
        }
        return make[self.form](record)

    def _of_messages(self, record: dict[str, Any]) -> dict[str, Any]:
        if "messages" in record or conversation_key(record):
            key = "messages" if "messages" in record else conversation_key(record)
            assert key is not None  # for mypy: one of the two is there
            messages = [self._turn(f"{key}[{at}]", turn) for at, turn in enumerate(_list(key, record[key]))]
            return self._conversation(record, messages, key)
        if not {"prompt", "completion"} <= record.keys():
            raise RowError('lacks the key "messages"')
        # TRL's: what the prompt says is read, the completion is trained.
        prompt = [self._turn(*each) | {"weight": 0} for each in _turns("prompt", _needed(record, "prompt"), "user")]
        answers = _turns("completion", _needed(record, "completion"), "assistant")
        for turn in prompt:
            if turn["role"] != "assistant":
                del turn["weight"]
        return self._conversation(record, [*prompt, *(self._turn(*each) for each in answers)], "prompt", "completion")

    def _of_sharegpt(self, record: dict[str, Any]) -> dict[str, Any]:
        key = conversation_key(record)
        if key is None:
            raise RowError(f"lacks the key {quoted(CONVERSATIONS[0])}")
        messages = []
        for at, turn in enumerate(_list(key, record[key])):
            place = f"{key}[{at}]"
            if not isinstance(turn, dict):
                raise RowError(f"{place} must be an object, found {kind_of(turn)}")
            turn = dict(turn)
            for name, other in (("role", "from"), ("content", "value")):
                if name not in turn:
                    turn[name] = _needed(turn, other, place)
                    del turn[other]
            if turn["role"] == "function_call":
                turn = {"role": "assistant", "content": "", "tool_calls": _calls(place, turn["content"])}
            messages.append(self._turn(place, turn))
        if isinstance(system := record.get("system"), str) and system.strip():
            messages.insert(0, {"role": "system", "content": system})
        return self._conversation(record, messages, key, "system")

    def _of_alpaca(self, record: dict[str, Any]) -> dict[str, Any]:
        answer = next((key for key in ("output", "response") if key in record), "output")
        question, more = _needed(record, "instruction"), record.get("input")
        turns: list[dict[str, Any]] = []
        if system := record.get("system"):
            turns.append({"role": "system", "content": system})
        for pair in _list("history", record.get("history") or []):
            if not isinstance(pair, list | tuple) or len(pair) != 2:
                raise RowError("history must be a list of pairs, a question and its answer each")
            turns += [{"role": "user", "content": pair[0]}, {"role": "assistant", "content": pair[1]}]
        both = f"{question}\n{more}" if isinstance(question, str) and isinstance(more, str) and more else question
        turns += [{"role": "user", "content": both}, {"role": "assistant", "content": _needed(record, answer)}]
        return self._conversation(record, turns, "instruction", "input", "system", "history", answer)

    def _of_columns(self, record: dict[str, Any]) -> dict[str, Any]:
        columns = self.columns
        assert columns is not None, "the form has been found with its columns"
        prompt, completion = (_cell(_needed(record, name)) for name in (columns.prompt, columns.completion))
        if columns.system is None:
            self.left_out |= record.keys() - {columns.prompt, columns.completion}
            return {"prompt": prompt, "completion": completion}
        system = record.get(columns.system)
        turns = [{"role": "user", "content": prompt}, {"role": "assistant", "content": completion}]
        first = [{"role": "system", "content": _cell(system)}] if system else []
        return self._conversation(record, [*first, *turns], columns.prompt, columns.completion, columns.system)

    def _of_text(self, record: dict[str, Any]) -> dict[str, Any]:
        self.left_out |= record.keys() - {"text"}
        return {"text": _needed(record, "text")}

    def _conversation(self, record: dict[str, Any], messages: list[dict[str, Any]], *used: str) -> dict[str, Any]:
        tools = next((record[key] for key in TOOLS if record.get(key)), None)
        if isinstance(tools, str) and not tools.strip(" \n[]"):
            tools = None
        self.left_out |= record.keys() - {*used, *TOOLS}
        if tools is not None:
            told = self.writer.tools(tools)
            if not messages or messages[0]["role"] != "system":
                messages = [{"role": "system", "content": ""}, *messages]
            messages = [messages[0] | {"tools": told}, *messages[1:]]
        return {"messages": messages}

    def _turn(self, place: str, turn: Any) -> dict[str, Any]:
        """One message, whoever's names its fields have."""
        if not isinstance(turn, dict):
            raise RowError(f"{place} must be an object, found {kind_of(turn)}")
        role = _needed(turn, "role", place)
        role = _ROLES.get(role.lower(), role) if isinstance(role, str) else role
        if role == "tool":
            self.writer.require_results()
        content, calls = self._content(f"{place}.content", turn.get("content"))
        for key in CALLS:
            if given := turn.get(key):
                calls += given if isinstance(given, list) else [given]
        if calls:
            content += self.writer.calls(calls)
        made: dict[str, Any] = {"role": role, "content": content}
        if role == "assistant":
            weight = next((turn[key] for key in ("weight", "loss_weight", "train") if key in turn), 1)
            if weight not in (0, 1):
                raise RowError(f"{place}: an answer is trained (1) or not (0), found the weight {quoted(str(weight))}")
            made |= {} if weight else {"weight": 0}
        if role == "system" and (tools := turn.get("tools")):
            made["tools"] = tools if isinstance(tools, str) else self.writer.tools(tools)
        known = {"role", "content", "weight", "loss_weight", "train", "tools", *CALLS}
        self.left_out |= {f"messages[].{key}" for key in turn.keys() - known}
        return made

    def _content(self, place: str, content: Any) -> tuple[str, list[Any]]:
        """The text of a message, and the calls among its parts."""
        if content is None:
            return "", []
        if isinstance(content, str):
            return content, []
        texts: list[str] = []
        calls: list[Any] = []
        for at, part in enumerate(_list(place, content)):
            kind = part.get("type") if isinstance(part, dict) else None
            value = part.get("text", part.get("value")) if isinstance(part, dict) else part
            if kind == "tool_call":
                calls += _calls(f"{place}[{at}]", value)
            elif kind in _NO_ANSWER:
                self.left_out.add(f"{kind} parts")
            elif kind == "text" and isinstance(value, str):
                texts.append(value)
            else:
                found = quoted(kind) if isinstance(kind, str) and kind != "text" else kind_of(value)
                raise RowError(f"{place}[{at}] must be a part of the type text, found {found}")
        return "".join(texts), calls


def converter_of(
    record: Any, form: FormName | None, columns: Mapping[str, str | None], writer: ToolWriter
) -> Converter:
    """How records like one are converted.

    Args:
        record: The first of a file.
        form: What they are, if somebody said so.
        columns: Names of the fields `prompt`, `completion` and `system`, as far as somebody said so.
        writer: Writes tools and their calls.

    Raises:
        FormError: Nobody knows, or they are not converted.
    """
    if not isinstance(record, dict):
        raise FormError(f"holds no objects: the first value is {kind_of(record)}", advice="make it an object")
    refuse_preference(record)
    if form is None:
        form = _form_of(record, columns)
    if form != "prompt-completion":
        return Converter(form, None, writer)
    guessed = guess_columns(record)
    named = {"prompt": guessed and guessed[0], "completion": guessed and guessed[1], "system": _system_of(record)}
    named |= {what: name for what, name in columns.items() if name is not None}
    for name in named.values():
        if name is not None and name not in record:
            raise FormError(f"has no column {quoted(name)}; there are {_names(record)}", advice="name one of these")
    if named["prompt"] is None or named["completion"] is None:
        raise _no_columns(record)
    return Converter(form, Columns(named["prompt"], named["completion"], named["system"]), writer)


def _form_of(record: dict[str, Any], columns: Mapping[str, str | None]) -> FormName:
    if any(columns.values()):
        return "prompt-completion"
    if "messages" in record:
        return "messages"
    if key := conversation_key(record):
        turns = _list(key, record[key])
        return "messages" if turns and isinstance(turns[0], dict) and "role" in turns[0] else "sharegpt"
    if isinstance(record.get("completion"), list) or isinstance(record.get("prompt"), list):
        return "messages"
    if is_alpaca(record):
        return "alpaca"
    if guess_columns(record):
        return "prompt-completion"
    if "text" in record:
        return "text"
    raise _no_columns(record)


def _no_columns(record: dict[str, Any]) -> FormError:
    usual = f"prompts are usually called {PROMPT_NAMES[0]} or {PROMPT_NAMES[1]}, completions {COMPLETION_NAMES[0]} or "
    return FormError(
        f"has the columns {_names(record)}, and nobody knows which is the prompt and which the completion ({usual}"
        f"{COMPLETION_NAMES[1]})",
        advice="say it with --prompt-column and --completion-column",
    )


def _names(record: dict[str, Any]) -> str:
    return ", ".join(quoted(str(name)) for name in list(record)[:8]) + (", …" if len(record) > 8 else "")


def _system_of(record: dict[str, Any]) -> str | None:
    return next((name for name in SYSTEM_NAMES if name in record), None)


def _needed(record: dict[str, Any], key: str, place: str = "") -> Any:
    if key not in record:
        raise RowError(f"{place} lacks the key {quoted(key)}".strip())
    return record[key]


def _list(place: str, value: Any) -> list[Any]:
    """A list, which a table has as JSON in a cell."""
    if isinstance(value, str) and value.lstrip().startswith("["):
        try:
            value = json.loads(value)
        except (ValueError, RecursionError) as error:
            raise RowError(f"{place} must be a list, found a string that is not valid JSON") from error
    if not isinstance(value, list):
        raise RowError(f"{place} must be a list, found {kind_of(value)}")
    return value


def _turns(place: str, value: Any, role: str) -> Iterator[tuple[str, Any]]:
    """Messages with their places; a string is one of a role."""
    if isinstance(value, str):
        yield place, {"role": role, "content": value}
    else:
        yield from ((f"{place}[{at}]", turn) for at, turn in enumerate(_list(place, value)))


def _calls(place: str, value: Any) -> list[Any]:
    """The calls that a text spells as JSON."""
    try:
        calls = json.loads(value) if isinstance(value, str) else value
    except (ValueError, RecursionError) as error:
        raise RowError(f"{place} must be a tool call in JSON, found {quoted(str(value))}") from error
    return calls if isinstance(calls, list) else [calls]


def _cell(value: Any) -> Any:
    """A number as the text that a table would have; all else is what it is."""
    return str(value) if isinstance(value, int | float) and not isinstance(value, bool) else value
