"""Text of a file or a model made safe to show: what could steer a terminal, or turn what follows, becomes visible."""

from __future__ import annotations

from unicodedata import category

_DIRECTIONS = frozenset("\u200e\u200f\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069")
"""Unicode's marks, embeddings, overrides and isolates of a direction: a name can look like another with them."""


def printable(text: str) -> str:
    """`text` with what could steer the terminal made visible, whatever file or model says it.

    That is control characters, those that turn the direction of what follows, and halves of a character, which cannot
    be written. Characters that join others, as in emoji, stay.
    """
    return "".join(ascii(char)[1:-1] if _steers(char) else char for char in text)


def _steers(char: str) -> bool:
    return char in _DIRECTIONS or (category(char) in ("Cc", "Cs") and char not in "\n\t")
