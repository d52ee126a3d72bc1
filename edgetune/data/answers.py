"""Where the assistant's answers lie in a rendered conversation.

Both ends are known exactly, nothing is searched for. An answer begins where the prompt that asks for it ends: the
earlier messages, rendered with the generation prompt. Its content ends where a mark comes out that was put at the end
of the message's content before rendering: a noncharacter, which neither templates nor people write. Few templates
write a prompt otherwise once it is answered; there a mark tells where the content begins as well.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

from edgetune.data.rows import Message
from edgetune.errors import DataError, IncompatibleError, TemplateStoppedError

_MARKS = [chr(code) for code in range(0xFDE0, 0xFDF0)]
"""Noncharacters: Unicode keeps them for programs, no text interchanges them (Unicode 16.0, section 23.7)."""
_OVERLAP = 32
"""Characters with which a content that was cut and what stands before it can end alike, at most."""
_Places = Mapping[int, Sequence[int]]
"""For each message where its mark came out; more than one place where the template shows the content again."""


class Renderer(Protocol):
    """Renders a conversation; `ChatTemplate.render` is one."""

    def __call__(self, messages: Sequence[Message], *, add_generation_prompt: bool) -> str:
        """The conversation as text."""


@dataclass(frozen=True)
class Answer:
    """One assistant message as the rendered conversation shows it; places are characters of its text."""

    index: int
    """Which of the messages it is."""
    begin: int
    """Where the prompt ends: all that follows is the model's to write."""
    content_end: int
    """Where the content ends, without white space at its end."""
    closing: str
    """What follows the content in the conversation that ends with this answer; empty where the template refuses it."""


@dataclass(frozen=True)
class Conversation:
    """A rendered conversation."""

    text: str
    answers: list[Answer]
    """Those that the text shows, in order."""
    left_out: list[str]
    """Roles of the messages with content that the text does not show."""
    ends_with_answer: bool
    """Whether the last message is an answer that the text shows."""


def render_conversation(render: Renderer, messages: Sequence[Message]) -> Conversation:
    """Render a conversation and tell its answers apart.

    Args:
        render: The model's chat template.
        messages: The turns.

    Raises:
        DataError: The template refuses the conversation, shows no answer of it, or changes an answer so that its end
            cannot be told; the one problem is the reason, without a place.
        IncompatibleError: The template is broken.
    """
    text = render(messages, add_generation_prompt=False)
    ends = _ends(render, messages, text)
    shown = [index for index, message in enumerate(messages) if message.role == "assistant" and ends.get(index) != []]
    answers = []
    for index in shown:
        begin, end = _span(render, messages, index, text, ends)
        last = index == len(messages) - 1
        closing = text[end:] if last else _closing(render, messages[: index + 1], text, end)
        answers.append(Answer(index, begin, end, closing))
    left_out = [index for index in range(len(messages)) if ends.get(index) == []]
    for index in left_out:
        if messages[index].role == "assistant" and _places(render, messages, index, text, at=0):
            raise DataError([_changed(index)])
    if not answers:
        raise DataError(["the chat template shows no answer of this conversation, so there is nothing to learn"])
    return Conversation(text, answers, [messages[index].role for index in left_out], shown[-1] == len(messages) - 1)


def is_shown(render: Renderer, messages: Sequence[Message], index: int) -> bool:
    """Whether the prompt that asks for the next answer shows the content of a message.

    Raises:
        DataError: The template refuses the conversation.
        IncompatibleError: The template is broken.
    """
    prompt = render(messages, add_generation_prompt=True)
    places = _marked(render, messages, [index], prompt, add_generation_prompt=True)
    return places is None or bool(places[index])


def common_length(first: Sequence[Any], second: Sequence[Any]) -> int:
    """How many elements two sequences have in common at their beginning."""
    shorter = min(len(first), len(second))
    return next((index for index in range(shorter) if first[index] != second[index]), shorter)


def _span(render: Renderer, messages: Sequence[Message], index: int, text: str, ends: _Places) -> tuple[int, int]:
    """Begin and end of an answer."""
    content = messages[index].content.strip()
    own = ends.get(index, ())
    prompt = _prompt(render, messages[:index])
    if prompt is not None and text.startswith(prompt):
        begin = len(prompt)
        end = next((end for end in own if end >= begin + min(1, len(content))), None)
        # A template whose prompts show some of the messages only can begin like one of them by chance.
        others = [end for other, places in ends.items() if other != index for end in places]
        if end is not None and not any(begin < other < end for other in others):
            return begin, end
    for end in own:
        for begin in _begins(text, content, end):
            if begin in _places(render, messages, index, text, at=len(content) - (end - begin)):
                return _with_white_space(text, begin, messages[index].content, prompt), end
    raise DataError([_changed(index)])


def _begins(text: str, content: str, end: int) -> Iterator[int]:
    """Where content that ends at `end` can begin: templates cut thoughts off that it begins with, if anything."""
    shown = common_length(text[max(0, end - len(content)) : end][::-1], content[::-1])
    yield from range(end - shown, min(end - shown + _OVERLAP, end if content else end + 1))


def _with_white_space(text: str, begin: int, content: str, prompt: str | None) -> int:
    """Where the model begins to write: of the white space before the bare content, with what the prompt does not have.

    Without a prompt to compare with, it is the white space that the content itself begins with.
    """
    bare = len(text[:begin].rstrip())
    if prompt is None:
        own = content[: len(content) - len(content.lstrip())]
        return begin - len(own) if text[bare:begin].endswith(own) else begin
    common = common_length(prompt, text[:begin])
    theirs = prompt[len(prompt.rstrip()) :]
    return common if common >= bare else bare + common_length(theirs, text[bare:begin])


def _changed(index: int) -> str:
    return (
        f"the chat template changes the answer in turn {index + 1}, so that it cannot be told from what stands around "
        "it; use prompt/completion rows with --raw-prompts"
    )


def _prompt(render: Renderer, messages: Sequence[Message]) -> str | None:
    """What asks for the next answer; None where the template takes other conversations only."""
    try:
        return render(messages, add_generation_prompt=True)
    except TemplateStoppedError:
        raise
    except IncompatibleError:
        if messages:
            raise
        return None  # many a template looks at the first message without asking whether there is one
    except DataError:
        return None


def _closing(render: Renderer, messages: Sequence[Message], text: str, end: int) -> str:
    """What follows the content of the last message when nothing follows that message."""
    try:
        alone = render(messages, add_generation_prompt=False)
    except DataError:
        return ""
    if alone[:end] == text[:end]:
        return alone[end:]
    ends = (_marked(render, messages, [len(messages) - 1], alone) or {}).get(len(messages) - 1)
    return alone[ends[-1] :] if ends else ""


def _ends(render: Renderer, messages: Sequence[Message], text: str) -> _Places:
    """Where the content of each message ends: no place where it is left out, no entry where that cannot be told."""
    # A mark in an empty message would change what templates test.
    indices = [at for at, message in enumerate(messages) if message.content.strip() or message.role == "assistant"]
    together = _marked(render, messages, indices, text)
    if together is not None:
        return together
    # A template may test how a content ends: then only that message has no mark.
    alone = (_marked(render, messages, [index], text) for index in indices)
    return {index: places[index] for places in alone if places is not None for index in places}


def _places(render: Renderer, messages: Sequence[Message], index: int, text: str, *, at: int) -> Sequence[int]:
    """Where a mark comes out at a place of a message's content, counted without white space around it."""
    return (_marked(render, messages, [index], text, at=at) or {}).get(index, ())


def _marked(
    render: Renderer,
    messages: Sequence[Message],
    indices: Sequence[int],
    text: str,
    *,
    at: int | None = None,
    add_generation_prompt: bool = False,
) -> _Places | None:
    """Where marks in these messages come out, at their end or at a place of their content.

    None when the template renders anything else otherwise because of them.
    """
    mark = next((mark for mark in _MARKS if not any(mark in message.content for message in messages)), None)
    if mark is None:
        raise DataError(["the messages have all of the noncharacters U+FDE0 to U+FDEF, which are no text; remove one"])
    turns = list(messages)
    for index in indices:
        content = turns[index].content
        bare = content.strip()
        place = content.index(bare) + (len(bare) if at is None else at)
        turns[index] = replace(turns[index], content=f"{content[:place]}{mark}{index}{mark}{content[place:]}")
    try:
        marked = render(turns, add_generation_prompt=add_generation_prompt)
    except TemplateStoppedError:
        raise
    except (DataError, IncompatibleError):
        return None
    places: dict[int, list[int]] = {index: [] for index in indices}
    shown, length = [], 0
    for position, piece in enumerate(re.split(f"{mark}([0-9]+){mark}", marked)):
        if position % 2:
            places.setdefault(int(piece), []).append(length)
        else:
            shown.append(piece)
            length += len(piece)
    return places if "".join(shown) == text else None
