"""From token ids that come one by one to the text that can be shown of them."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from edgetune.data.answers import common_length
from edgetune.data.encode import Encoder

_INCOMPLETE = "\ufffd"
"""What the bytes of a character decode to that has more to come."""


def text_pieces(encoder: Encoder, ids: Iterable[int]) -> Iterator[str]:
    """Decode ids as they come.

    Together the pieces are what `Encoder.decode` makes of all ids, unless bytes that were shown as a character turn out
    to be none. A piece waits while its last character lacks bytes. The whole answer is decoded each time, because a
    tokenizer writes a token differently at the start of a text.
    """
    seen: list[int] = []
    shown = text = ""
    for token in ids:
        seen.append(token)
        text = encoder.decode(seen)
        if not text.endswith(_INCOMPLETE):
            if fresh := _fresh(shown, text):
                yield fresh
            shown = text
    if fresh := _fresh(shown, text):
        yield fresh


def _fresh(shown: str, text: str) -> str:
    """What of `text` comes after its agreement with `shown`."""
    return text[common_length(shown, text) :]
