"""Rows of JSONL, checked: every problem of a file is reported as `file:line: reason`."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from edgetune.data.forms import foreign_record, refuse_foreign_file, refuse_preference
from edgetune.data.json_lines import lines_of, parsed
from edgetune.data.problems import FormError, Problems, RowError, checked_text, filled_text, kind_of, quoted
from edgetune.data.source import Source, name_of, open_source
from edgetune.text.suggestion import is_slip

MESSAGE_LIMIT = 1000
"""Most messages of a conversation; each answer costs a rendering of all that comes before it."""
ROLES = ("system", "user", "assistant", "tool")
SCHEMAS: dict[str, tuple[str, ...]] = {
    "messages": ("messages",),
    "prompt/completion": ("prompt", "completion"),
    "text": ("text",),
}
"""The kinds of rows and their keys. A row is of the first kind all of whose keys it has."""
TOOLS = ("tools", "functions")
"""Keys of a row that hold what the model may call; a message can have `tools` as well."""
CALLS = ("tool_calls", "function_call")
"""Keys of a message that hold what the model calls."""
_MEANT = ("weight", "tools", *CALLS)
"""Keys of a message that change what is learnt: one that is misspelt must not be taken for a further key."""
_OTHER_ROLES = ("developer", "function")
_EXPECTED = 'a row has "messages", "prompt" and "completion", or "text"; a message has "role" and "content"'
_WITH_TOOLS = " --bundle BUNDLE"


@dataclass(frozen=True)
class Message:
    """One turn of a conversation."""

    role: str
    """`system`, `user`, `assistant` or `tool`."""
    content: str
    trained: bool = True
    """Whether it is trained, if it is an answer."""
    tools: str | None = None
    """What the model may call, in the words that its template puts into the system's turn."""


@dataclass(frozen=True)
class ChatRow:
    """A conversation; the assistant's answers are trained."""

    line: int
    messages: tuple[Message, ...]
    ignored: frozenset[str] = frozenset()
    """Further keys, which mean nothing here."""


@dataclass(frozen=True)
class CompletionRow:
    """A prompt and its continuation; the continuation is trained."""

    line: int
    prompt: str
    completion: str
    ignored: frozenset[str] = frozenset()
    """Further keys, which mean nothing here."""


@dataclass(frozen=True)
class TextRow:
    """Plain text; all of it is trained."""

    line: int
    text: str
    ignored: frozenset[str] = frozenset()
    """Further keys, which mean nothing here."""


Row = ChatRow | CompletionRow | TextRow


def read_rows(source: Source, problems: Problems) -> Iterator[Row]:
    """Read JSONL: UTF-8, one object a line, all of the same kind, gzip or not; blank lines are skipped.

    Lines longer than `json_lines.LINE_LIMIT` are refused without being read whole. No more than one row is held. A file
    of another form is one problem, of its first row, and is read no further.

    Args:
        source: A file or a pipe.
        problems: Hears of every line that is wrong, and why; its row is left out.

    Raises:
        UsageError: Nothing can be read there.
    """
    expected: str | None = None
    mixed, empty = False, True
    told: set[str] = set()
    with open_source(source) as file:
        for line in lines_of(file):
            try:
                if empty:
                    empty = False
                    refuse_foreign_file(line, file, name_of(source))
                kind, row = row_of(parsed(line), line.number)
            except FormError as error:
                if str(error) not in told:
                    told.add(str(error))
                    problems.add(line.number, error.told(source))
                if expected is None:
                    return
                continue
            except RowError as error:
                problems.add(line.number, str(error))
                if expected is None and not line.raw.lstrip().startswith(b"{"):
                    return  # a file whose first row is no object has no rows at all
                continue
            expected = expected or kind
            if kind == expected:
                yield row
            elif not mixed:
                mixed = True
                problems.add(
                    line.number, f"is a {kind} row, but the rows before are {expected} rows; use one kind a file"
                )
    if empty:
        problems.add(1, 'the file has no rows; write one JSON object a line, such as {"text": "…"}')


def row_of(record: Any, line: int) -> tuple[str, Row]:
    """A row of the JSON value of its line, and its kind.

    Args:
        record: The value.
        line: Where it stands, counted from 1.

    Raises:
        RowError: It is no row.
        FormError: It is sound, but of another form.
    """
    if not isinstance(record, dict):
        raise RowError(f'expected an object such as {{"text": "…"}}, found {kind_of(record)}')
    refuse_preference(record)
    kind = _schema_of(record)
    ignored = {key for key in record if key not in SCHEMAS[kind]}
    if kind == "messages":
        if any(record.get(key) for key in TOOLS):
            raise FormError("has tools, which each model is told in its own way", flags=_WITH_TOOLS)
        messages = _messages(record["messages"], ignored)
        return kind, ChatRow(line, messages, _names(ignored))
    if kind == "text":
        return kind, TextRow(line, filled_text("text", record["text"]), _names(ignored))
    if isinstance(record["prompt"], list) or isinstance(record["completion"], list):
        raise FormError("has lists of messages as prompt and completion")
    prompt = checked_text("prompt", record["prompt"])
    return kind, CompletionRow(line, prompt, filled_text("completion", record["completion"]), _names(ignored))


def _schema_of(record: dict[str, Any]) -> str:
    for kind, keys in SCHEMAS.items():
        if all(key in record for key in keys):
            _refuse_slips(record, (*keys, "tools") if kind == "messages" else keys)
            return kind
    known = [key for keys in SCHEMAS.values() for key in keys]
    _refuse_slips(record, known)
    if form := foreign_record(record):
        raise form
    for keys in SCHEMAS.values():
        for key in keys:
            if any(other in record for other in keys) and key not in record:
                raise RowError(f"lacks the key {quoted(key)}")
    if not record:
        raise RowError(f"is an empty object; {_EXPECTED}")
    names = ", ".join(quoted(key) for key in list(record)[:6])
    raise FormError(
        f"has the keys {names}, and none of a row; {_EXPECTED}", flags=" --prompt-column KEY --completion-column KEY"
    )


def _refuse_slips(record: dict[str, Any], known: Sequence[str], where: str = "") -> None:
    """Refuse a key that is misspelt: one that is nearly a known one, which the object lacks."""
    missing = [key for key in known if key not in record]
    for key in record:
        if key not in known:
            for meant in missing:
                if is_slip(key, meant):
                    raise RowError(f"{where}has the unknown key {quoted(key)}; did you mean {quoted(meant)}?")


def _messages(value: Any, ignored: set[str]) -> tuple[Message, ...]:
    if not isinstance(value, list):
        raise RowError(f'"messages" must be a list, found {kind_of(value)}')
    if len(value) > MESSAGE_LIMIT:
        raise RowError(f'"messages" has {len(value):,} entries, at most {MESSAGE_LIMIT:,} are taken; split the row')
    messages = tuple(_message(f"messages[{index}]", item, ignored) for index, item in enumerate(value))
    answers = [message for message in messages if message.role == "assistant"]
    if not answers:
        raise RowError('"messages" has no assistant message, so nothing to learn; add the answer')
    if not any(message.trained for message in answers):
        raise RowError('every assistant message has "weight" 0, so there is nothing to learn; remove the row')
    return messages


def _message(where: str, value: Any, ignored: set[str]) -> Message:
    if not isinstance(value, dict):
        raise RowError(f'{where} must be an object with "role" and "content", found {kind_of(value)}')
    _refuse_slips(value, ("role", "content", *_MEANT), f"{where} ")
    if {"from", "value"} <= value.keys():
        raise FormError("has ShareGPT's messages (from, value)")
    if any(value.get(key) for key in CALLS):
        raise FormError("has tool calls, which each model writes in its own way", flags=_WITH_TOOLS)
    if "loss_weight" in value or "train" in value:
        raise FormError('says what is trained with "loss_weight" or "train", not with "weight"')
    for key in ("role", "content"):
        if key not in value:
            raise RowError(f"{where} lacks the key {quoted(key)}")
    role = value["role"]
    if role in _OTHER_ROLES:
        raise FormError(f'has messages of the role "{role}"', flags=_WITH_TOOLS if role == "function" else "")
    if role not in ROLES:
        found = quoted(role) if isinstance(role, str) else kind_of(role)
        raise RowError(f"{where}.role must be one of {', '.join(ROLES)}, found {found}")
    content = value["content"]
    text = _joined(f"{where}.content", content) if isinstance(content, list) else content
    used = {"role", "content"}
    trained, tools = True, None
    if role == "assistant":
        used.add("weight")
        trained = _is_trained(where, value)
    elif role == "system":
        used.add("tools")
        tools = _tools(where, value.get("tools"))
    ignored |= {f"messages[].{key}" for key in value.keys() - used}
    check = filled_text if role == "assistant" and trained else checked_text
    return Message(role, check(f"{where}.content", text), trained, tools)


def _joined(where: str, parts: list[Any]) -> str:
    """The text of content that is a list of texts."""
    texts = []
    for index, part in enumerate(parts):
        place = f"{where}[{index}]"
        if not isinstance(part, dict):
            raise RowError(f'{place} must be an object such as {{"type": "text", "text": "…"}}, found {kind_of(part)}')
        kind = part.get("type")
        if "value" in part and "text" not in part:
            raise FormError('has its texts in "value" (content parts of LLaMA-Factory)', flags=_WITH_TOOLS)
        if kind != "text":
            found = quoted(kind) if isinstance(kind, str) else kind_of(kind)
            raise RowError(f"{place} is of the type {found}, and the model reads text alone; remove it")
        texts.append(checked_text(f"{place}.text", part.get("text")))
    return "".join(texts)


def _is_trained(where: str, message: dict[str, Any]) -> bool:
    weight = message.get("weight", 1)
    if isinstance(weight, bool) or weight not in (0, 1):
        raise RowError(f"{where}.weight must be 0 (not trained) or 1, found {quoted(str(weight))}")
    return bool(weight)


def _tools(where: str, value: Any) -> str | None:
    if isinstance(value, (list, dict)) and value:
        raise FormError("has tools as objects, which each model is told in its own way", flags=_WITH_TOOLS)
    return checked_text(f"{where}.tools", value) or None if value else None


def _names(ignored: Iterable[str]) -> frozenset[str]:
    return frozenset(quoted(name) for name in ignored)
