"""What a person may have meant by a word that does not exist."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


def closest(word: str, known: Iterable[str]) -> list[str]:
    """At most two of the `known` words, best first: alike in spelling, or `word` is a part or the initials.

    Args:
        word: What was written, such as `stepz`, `rate` or `lr`.
        known: The words that exist, such as `steps` and `learning-rate`, in the same style (dashes or underscores).
    """
    candidates = list(known)
    alike = difflib.get_close_matches(word, candidates, n=2)
    if alike or not word:
        return alike
    return [name for name in candidates if word in name or word == _initials(name)][:2]


def did_you_mean(word: str, known: Iterable[str], prefix: str = "") -> str:
    """`; did you mean …?` to append to a message, or nothing when no word is close. `prefix` goes before each word."""
    words = [f"'{prefix}{name}'" for name in closest(word, known)]
    return f"; did you mean {' or '.join(words)}?" if words else ""


def _initials(name: str) -> str:
    return "".join(part[0] for part in name.replace("_", "-").split("-") if part)
