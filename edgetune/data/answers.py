"""Where the assistant's answers lie in a rendered conversation.

Both ends are known exactly, nothing is searched for. An answer begins where the prompt that asks for it ends: the
earlier messages, rendered with the generation prompt. Its content ends where a mark comes out that was put at the end
of the message's content before rendering: a noncharacter, which neither templates nor people write.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

from edgetune.data.rows import Message
from edgetune.errors import DataError, IncompatibleError

_MARKS = [chr(code) for code in range(0xFDE0, 0xFDF0)]
"""Noncharacters: Unicode keeps them for programs, no text interchanges them (Unicode 16.0, section 23.7)."""
_Places = Mapping[int, Sequence[int]]
"""For each message where its mark came out; more than one place where the template shows the content again."""


class Renderer(Protocol):
    """Renders a conversation; `ChatTemplate.render` is one."""

    def __call__(self, messages: Sequence[Message], *, add_generation_prompt: bool) -> str:
        """The conversation as text."""


@dataclass(frozen=True)
class Answer:
    """One assistant message as the rendered conversation shows it; places are characters of its text."""

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
    answers: list[Answer] = []
    for index in shown:
        begin, end = _span(render, messages, index, text, ends, answers[-1].content_end if answers else 0)
        last = index == len(messages) - 1
        closing = text[end:] if last else _closing(render, messages[: index + 1], text, end)
        answers.append(Answer(begin, end, closing))
    if not answers:
        raise DataError(["the chat template shows no answer of this conversation, so there is nothing to learn"])
    left_out = [message.role for index, message in enumerate(messages) if ends.get(index) == []]
    return Conversation(text, answers, left_out, shown[-1] == len(messages) - 1)


def common_length(first: Sequence[Any], second: Sequence[Any]) -> int:
    """How many elements two sequences have in common at their beginning."""
    shorter = min(len(first), len(second))
    return next((index for index in range(shorter) if first[index] != second[index]), shorter)


def _span(
    render: Renderer, messages: Sequence[Message], index: int, text: str, ends: _Places, earlier: int
) -> tuple[int, int]:
    """Begin and end of an answer; the one before it ends at `earlier`."""
    prompt = _attempt(render, messages[:index], add_generation_prompt=True) or ""
    own = ends.get(index, ())
    least = 1 if messages[index].content.strip() else 0
    if prompt and text.startswith(prompt):
        end = next((end for end in own if end >= len(prompt) + least), None)
        # A template that shows some of the messages only can begin like the prompt by chance.
        others = [end for other, places in ends.items() if other != index for end in places]
        chance = end is None or any(len(prompt) < other < end for other in others)
        if end is not None and not chance and not _lacks_header(render, messages, index, text, prompt):
            return len(prompt), end
    # Some templates open a chain of thought in the prompt only, or put the system's text into the last turn.
    begins = _marked(render, messages, [index], text, at_end=False) or {}
    for begin in begins.get(index, ()):
        end = next((end for end in own if end >= begin + least), None)
        if begin >= earlier and end is not None:
            return _after_white_space(text, begin, prompt), end
    # Others cut the beginning of the content off: then the prompt is what both have in common.
    common = common_length(prompt, text)
    end = next((end for end in own if end > common), None)
    if common >= max(earlier, 1) and end is not None:
        return common, end
    raise DataError(
        [
            f"the chat template changes messages[{index}].content, so that the answer cannot be told from what "
            "stands around it; use prompt/completion rows with --raw-prompts"
        ]
    )


def _lacks_header(render: Renderer, messages: Sequence[Message], index: int, text: str, prompt: str) -> bool:
    """Whether the template knows no generation prompt, so that `prompt` ends before the header of the answer."""
    if text[len(prompt) :].lstrip().startswith(messages[index].content.strip()):
        return False
    return _attempt(render, messages[:index], add_generation_prompt=False) == prompt


def _after_white_space(text: str, begin: int, prompt: str) -> int:
    """Of the white space before the content, what the prompt has as well is the prompt's; the model writes the rest."""
    bare = len(text[:begin].rstrip())
    theirs = prompt[len(prompt.rstrip()) :]
    return bare + common_length(theirs, text[bare:begin])


def _closing(render: Renderer, messages: Sequence[Message], text: str, end: int) -> str:
    """What follows the content of the last message when nothing follows that message."""
    alone = _attempt(render, messages, add_generation_prompt=False)
    if alone is None:
        return ""
    if alone[:end] == text[:end]:
        return alone[end:]
    places = _marked(render, messages, [len(messages) - 1], alone, at_end=True) or {}
    ends = places.get(len(messages) - 1, ())
    return alone[ends[-1] :] if ends else ""


def _ends(render: Renderer, messages: Sequence[Message], text: str) -> _Places:
    """Where the content of each message ends: no place where it is left out, no entry where that cannot be told."""
    # A mark in an empty message would change what templates test.
    indices = [at for at, message in enumerate(messages) if message.content.strip() or message.role == "assistant"]
    together = _marked(render, messages, indices, text, at_end=True)
    if together is not None:
        return together
    # A template may test how a content ends: then only that message has no mark.
    alone = (_marked(render, messages, [index], text, at_end=True) for index in indices)
    return {index: places[index] for places in alone if places is not None for index in places}


def _marked(
    render: Renderer, messages: Sequence[Message], indices: Sequence[int], text: str, *, at_end: bool
) -> _Places | None:
    """Where marks in these messages come out; None when the template renders anything else otherwise for them."""
    mark = next((mark for mark in _MARKS if not any(mark in message.content for message in messages)), None)
    if mark is None:
        raise DataError(["the messages have all of the noncharacters U+FDE0 to U+FDEF, which are no text; remove one"])
    turns = list(messages)
    for index in indices:
        content = turns[index].content
        bare = content.strip()
        place = content.index(bare) + (len(bare) if at_end else 0)
        turns[index] = replace(turns[index], content=f"{content[:place]}{mark}{index}{mark}{content[place:]}")
    marked = _attempt(render, turns, add_generation_prompt=False)
    if marked is None:
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


def _attempt(render: Renderer, messages: Sequence[Message], *, add_generation_prompt: bool) -> str | None:
    """The rendered messages; None when the template takes other conversations only."""
    try:
        return render(messages, add_generation_prompt=add_generation_prompt)
    except (DataError, IncompatibleError):
        return None
