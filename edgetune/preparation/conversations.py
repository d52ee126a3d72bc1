"""What the chat template makes of conversations, tried out before anything is trained."""

from __future__ import annotations

from dataclasses import dataclass

from edgetune.data.encode import IGNORED, Encoder
from edgetune.data.rows import ChatRow, Message
from edgetune.errors import EdgetuneError

_QUESTION, _ANSWER = Message("user", "Hello"), Message("assistant", "Hello")


@dataclass(frozen=True)
class Conversations:
    """How conversations are trained."""

    end: int | None
    """Id of the token that ends the last answer; none where the template takes other conversations only."""
    closed_by_text: bool
    """Whether text alone closes an answer when another turn follows, so that no end is trained there."""
    shows_system: bool
    """Whether a prompt shows what the system says."""


def try_conversations(encoder: Encoder) -> Conversations:
    """Encode short conversations, and look which tokens are trained."""
    ends = [_last_trained(encoder, turns) for turns in ([_QUESTION, _ANSWER], [_QUESTION, _ANSWER, _QUESTION])]
    try:
        shows_system = encoder.shows(0, [Message("system", "Be brief."), _QUESTION])
    except EdgetuneError:  # a template that refuses a system's turn says so with each row
        shows_system = True
    return Conversations(ends[0], None not in ends and ends[0] != ends[1], shows_system)


def _last_trained(encoder: Encoder, turns: list[Message]) -> int | None:
    try:
        labels = encoder.encode(ChatRow(1, tuple(turns))).labels
    except EdgetuneError:  # a template that wants other conversations than this one
        return None
    return next(label for label in reversed(labels) if label != IGNORED)
