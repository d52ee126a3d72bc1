"""A conversation: each answer is given to all turns before it, as far as the model's context holds them."""

from __future__ import annotations

from collections.abc import Callable, Generator, Sequence
from os import PathLike

from edgetune.config import ChatConfig, check_config
from edgetune.data.encode import Encoder, Remark, load_encoder
from edgetune.data.rows import Message
from edgetune.errors import UsageError
from edgetune.formats.bundle import Bundle
from edgetune.formats.genai import Answering, open_model
from edgetune.formats.manifest import RowEncoding
from edgetune.generation.loaded import LoadedModel, check_length
from edgetune.generation.pieces import text_pieces
from edgetune.machine.threads import computing_with, thread_count
from edgetune.text.pulse import silent


class Chat:
    """A model that is loaded once, and the turns so far.

    Args:
        model: A folder that `export` wrote, or a bundle, which answers as the base.
        config: How to answer.
        system: What the system says before all turns; it is never left out.
        say: Called with one line of text for each thing that is to be said of the conversation.

    Raises:
        UsageError: A value of the configuration that cannot be meant; there is no model or no such adapter, it holds no
            conversation, or `system` has no place in its template.
        IncompatibleError: A format or version that this edgetune does not read, or a broken template.
        VerificationError: A file is missing or changed, or the configuration could do harm.
        EdgetuneError: ONNX Runtime GenAI cannot load it.
    """

    def __init__(
        self,
        model: Bundle | str | PathLike[str],
        config: ChatConfig = ChatConfig(),
        *,
        system: str | None = None,
        say: Callable[[str], None] = silent,
    ) -> None:
        check_config(config)
        self._config, self._say = config, say
        self._model = open_model(model)
        self._system = [] if system is None else [Message("system", system)]
        self._turns: list[Message] = []
        self._remarked: set[Remark] = set()
        self._answering, self._encoder = self._chosen(config.adapter)
        if self._system and not self._encoder.shows(0, [*self._system, Message("user", "hello")]):
            raise UsageError("the model's chat template leaves the system's text out; say it in the first turn")
        with computing_with(config.threads):
            self._loaded = LoadedModel(self._model, thread_count())

    @property
    def adapter(self) -> str:
        """Name of the adapter that answers; `base` without one."""
        return self._answering.name

    @property
    def adapters(self) -> list[str]:
        """Names of the adapters that can be chosen."""
        return self._model.adapters

    @property
    def turns(self) -> tuple[Message, ...]:
        """What was said and is not left out, without the system's text."""
        return tuple(self._turns)

    def use(self, adapter: str) -> None:
        """Let another adapter answer from now on; the turns stay.

        Raises:
            UsageError: There is none of this name, or it was not trained on conversations.
        """
        self._answering, self._encoder = self._chosen(adapter)

    def reset(self) -> None:
        """Forget all turns."""
        self._turns.clear()

    def answer(self, text: str) -> Generator[str, None, None]:
        """Say something, and take the pieces of the answer as they come.

        An answer that is not taken to its end is remembered as far as it was; without any piece of it, what was said is
        forgotten as well.

        Raises:
            UsageError: What was said is longer than the model takes.
            DataError: The chat template refuses the conversation.
            EdgetuneError: ONNX Runtime GenAI failed.
        """
        said: list[str] = []
        self._turns.append(Message("user", text))
        try:
            input_ids = self._fitting()
            ids = self._loaded.stream(input_ids, self._config, self._answering)
            for piece in text_pieces(self._encoder, ids):
                said.append(piece)
                yield piece
        finally:
            if any(said):
                self._turns.append(Message("assistant", "".join(said)))
            else:
                self._turns.pop()

    def _fitting(self) -> list[int]:
        """The prompt; the oldest turns leave it, and the conversation, where there would be no place for the answer."""
        most = self._model.context_length
        place = min(self._config.max_new_tokens, most // 2)
        turns = list(self._turns)
        input_ids = self._encoded(turns)
        while len(input_ids) + place > most and len(turns) > 1:
            del turns[:2]
            input_ids = self._encoded(turns)
        check_length(input_ids, most)
        if left_out := len(self._turns) - len(turns):
            self._turns = turns
            self._say(f"the {left_out} oldest turns are left out: the model takes {most:,} tokens, answer and all")
        return input_ids

    def _encoded(self, turns: Sequence[Message]) -> list[int]:
        messages = [*self._system, *turns]
        for remark in self._encoder.remarks_of(messages) - self._remarked:
            self._remarked.add(remark)
            self._say(remark)
        return self._encoder.encode_prompt(messages)

    def _chosen(self, adapter: str | None) -> tuple[Answering, Encoder]:
        answering = self._model.answering(adapter)
        encoding = answering.encoding | RowEncoding(content_as_text=self._config.content_as_text)
        encoder = load_encoder(self._model.path, self._model.manifest.tokenizer, encoding)
        if encoder.asks_raw:
            who = self._model.path if encoder.template is None else f"adapter {answering.name}"
            why = "has no chat template" if encoder.template is None else "was trained on raw prompts"
            raise UsageError(f"{who} {why}, so it holds no conversation; ask it with `edgetune generate`")
        return answering, encoder
