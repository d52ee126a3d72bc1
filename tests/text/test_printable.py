"""What could steer a terminal, or turn the direction of what follows, becomes visible; all else stays."""

from __future__ import annotations

from edgetune.text.printable import printable


def test_control_characters_are_made_visible() -> None:
    assert printable("a\tb\nc\x1b[2J\x9b\x7f é 日本 👩‍🚀") == "a\tb\nc\\x1b[2J\\x9b\\x7f é 日本 👩‍🚀"


def test_directions_and_halves_are_made_visible_and_joined_emoji_stay() -> None:
    assert printable("a\u202eb\u2069c\u200fd") == "a\\u202eb\\u2069c\\u200fd"
    assert printable("\ud83d \udcff") == "\\ud83d \\udcff"
    for text in ("👩\u200d🚀", "a\u200cb", "שלום", "e\u0301", "soft\u00adhyphen"):
        assert printable(text) == text
