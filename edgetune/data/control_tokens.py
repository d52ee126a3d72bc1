"""Control tokens such as `<|end|>`: whether a text spells one, and how to encode such a text as nothing but text.

A chat template writes control tokens as text, and the tokenizer reads them back, wherever they come from. So whoever
types `<|end|>` into a message ends its turn, which is what transformers does too. `ContentAsText` tells the template's
own control tokens from those in the content: before rendering, those in the content are hidden; in the rendered
text, the template's get private names, under which a copy of the tokenizer knows them; then the hidden ones are
written again.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from edgetune.errors import DataError, IncompatibleError

if TYPE_CHECKING:
    import tokenizers

_HIDDEN, _NAMED = "\ufdd0", "\ufdd1"
"""Noncharacters: Unicode keeps them for programs, no text interchanges them (Unicode 16.0, section 23.7)."""


class ControlTokens:
    """The control tokens of a tokenizer: its special tokens, and other added ones that are written like `<…>`.

    Args:
        tokenizer: The model's tokenizer.
    """

    def __init__(self, tokenizer: tokenizers.Tokenizer) -> None:
        self.ids: Mapping[str, int] = {
            token.content: id
            for id, token in tokenizer.get_added_tokens_decoder().items()
            if token.content.strip() and (token.special or re.fullmatch("<.+>", token.content))
        }
        """Id of each by its text."""
        # As the tokenizer does: the leftmost, and of those the longest.
        longest_first = sorted(self.ids, key=len, reverse=True)
        self.pattern = re.compile("|".join(map(re.escape, longest_first)) or "(?!)")

    def spelt_in(self, text: str) -> bool:
        """Whether the tokenizer would read a control token in `text`."""
        return self.pattern.search(text) is not None


class ContentAsText:
    """Encodes the content of messages as text, whatever it spells; all other token ids stay what they are.

    Args:
        tokenizer: The model's tokenizer.

    Raises:
        IncompatibleError: The tokenizer's vocabulary is not of the kind that Phi-3 models have (BPE).
    """

    def __init__(self, tokenizer: tokenizers.Tokenizer) -> None:
        control = ControlTokens(tokenizer)
        self._pattern = control.pattern
        self._texts = list(control.ids)
        self._names = {text: f"{_NAMED}{number}{_NAMED}" for number, text in enumerate(self._texts)}
        self._edges = {ord(edge): "x" for text in self._texts for edge in (text[0], text[-1])}
        self.tokenizer = _renamed(tokenizer, self._names)
        """Knows control tokens by their private names alone."""
        if any(self.tokenizer.token_to_id(self._names[text]) != id for text, id in control.ids.items()):
            raise IncompatibleError("the tokenizer numbers its added tokens otherwise; leave out --content-as-text")

    def hidden(self, content: str) -> str:
        """Content that spells no control token any more.

        Raises:
            DataError: The content has one of the two noncharacters that are used here.
        """
        if strange := {_HIDDEN, _NAMED} & set(content):
            raise DataError([f"the text has the noncharacter {min(strange)!a}, which is no text; remove it"])
        return self._pattern.sub(lambda found: f"{_HIDDEN}{self._texts.index(found[0])}{_HIDDEN}", content)

    def harmless(self, content: str) -> str:
        """Content with which nothing can begin or end a control token, as long as before."""
        return content.translate(self._edges)

    def require_equal(self, rendered: str, expected: str) -> None:
        """See that what was rendered from hidden content has the control tokens that harmless content gives.

        Raises:
            DataError: The template puts pieces of content together so that they spell a control token.
        """
        if self._pattern.findall(rendered) != self._pattern.findall(expected):
            raise DataError(["the chat template joins the messages so that they spell a control token; change them"])

    def named(self, rendered: str) -> str:
        """A text that was rendered from hidden content, for `tokenizer`: control tokens renamed, content restored."""
        named = self._pattern.sub(lambda found: self._names[found[0]], rendered)
        return re.sub(f"{_HIDDEN}([0-9]+){_HIDDEN}", lambda found: self._texts[int(found[1])], named)


def _renamed(tokenizer: tokenizers.Tokenizer, names: Mapping[str, str]) -> tokenizers.Tokenizer:
    from tokenizers import Tokenizer

    record: dict[str, Any] = json.loads(tokenizer.to_str())
    model = record["model"]
    if not isinstance(model.get("vocab"), dict):
        kind = model.get("type")
        raise IncompatibleError(f"--content-as-text takes BPE tokenizers, this one is {kind}; leave it out")
    for token in record["added_tokens"]:
        token["content"] = names.get(token["content"], token["content"])
    model["vocab"] = {names.get(text, text): id for text, id in model["vocab"].items()}
    model["unk_token"] = names.get(model.get("unk_token"), model.get("unk_token"))
    return Tokenizer.from_str(json.dumps(record))
