"""Where the assistant's answers lie in a rendered conversation."""

from __future__ import annotations

from collections.abc import Sequence

from edgetune.data.rows import Message
from edgetune.data.template import ChatTemplate
from edgetune.errors import DataError, IncompatibleError

Span = tuple[int, int]
"""First character, and the one after the last."""


def answer_spans(template: ChatTemplate, messages: Sequence[Message], text: str) -> list[Span]:
    """Where each assistant message's answer lies in the rendered conversation."""
    spans = []
    cursor = 0  # everything before it belongs to earlier messages
    for index, message in enumerate(messages):
        span = _find(text, message.content, cursor)
        if message.role == "assistant":
            begin = _prompt_length(template, messages[:index], text)
            if begin is not None and begin >= cursor:
                found = _find(text, message.content, begin)
                # What stands between the prompt and the content is the model's to write if it is white space only.
                if found is not None and not text[begin : found[0]].strip():
                    span = (begin, found[1])
            if span is None:
                raise IncompatibleError(
                    f"the model's chat template changes the content of messages[{index}], so its answer cannot be told "
                    "apart; use prompt/completion rows"
                )
            spans.append(span)
        if span is not None:
            cursor = span[1]
    return spans


def _prompt_length(template: ChatTemplate, earlier: Sequence[Message], text: str) -> int | None:
    try:
        prompt = template.render(earlier, add_generation_prompt=True)
    except (DataError, IncompatibleError):  # some templates take whole conversations only
        return None
    return len(prompt) if text.startswith(prompt) else None


def _find(text: str, content: str, start: int) -> Span | None:
    for candidate in (content, content.strip()):  # templates may strip
        if candidate and (position := text.find(candidate, start)) >= 0:
            return position, position + len(candidate)
    return None
