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


def is_slip(word: str, meant: str) -> bool:
    """Whether a word is another one but for a slip of the pen: one letter, or two of a long word.

    A letter can be missing, added or another one, in the wrong case, or have changed places with the next.

    Args:
        word: What was written, such as `mesages`.
        meant: What may have been meant, such as `messages`.
    """
    word, most = word.lower(), 1 if len(meant) <= 6 else 2
    if abs(len(word) - len(meant)) > most:
        return False
    before: list[int] = []
    row = list(range(len(meant) + 1))
    for i, letter in enumerate(word, start=1):
        before, row, last = row, [i], before
        for j, other in enumerate(meant, start=1):
            cost = min(before[j] + 1, row[j - 1] + 1, before[j - 1] + (letter != other))
            if i > 1 and j > 1 and letter == meant[j - 2] and word[i - 2] == other:
                cost = min(cost, last[j - 2] + 1)
            row.append(cost)
    return row[-1] <= most
