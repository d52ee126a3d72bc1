"""Answers from a model folder through ONNX Runtime GenAI."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from os import PathLike

from edgetune.config import GenerateConfig, SearchConfig, check_config
from edgetune.data.encode import Encoder, load_encoder
from edgetune.data.rows import Message
from edgetune.errors import UsageError
from edgetune.formats.bundle import Bundle
from edgetune.formats.genai import Answering, GenaiModel, open_model
from edgetune.formats.manifest import RowEncoding
from edgetune.generation.loaded import LoadedModel, check_length
from edgetune.generation.pieces import text_pieces
from edgetune.machine.threads import computing_with, thread_count
from edgetune.text.pulse import silent


def generate(
    model: Bundle | str | PathLike[str],
    prompt: str,
    config: GenerateConfig = GenerateConfig(),
    *,
    system: str | None = None,
    say: Callable[[str], None] = silent,
) -> Iterator[str]:
    """Answer a prompt.

    What is wrong with the call is raised by the call; the answer is computed as its pieces are taken.

    Args:
        model: A folder that `export` wrote, whose adapter, where it has one beside it, is active; or a bundle, which
            answers as the base: its path, or what `load_bundle` gave.
        prompt: The user's turn; without a chat template or raw, the text to continue.
        config: How to answer; where the model's adapter was trained on raw prompts or on content as text, so it is
            asked.
        system: The system's turn.
        say: Called with one line of text for each thing that is to be said of the prompt.

    Returns:
        Pieces of the answer as they come, without special tokens; joined, they are the answer.

    Raises:
        UsageError: A value of the configuration that cannot be meant; there is no model or no such adapter, the prompt
            is empty or longer than the model takes, `system` has no place, or so many threads cannot compute here.
        DataError: The chat template refuses the conversation.
        IncompatibleError: A format or version that this edgetune does not read, or a broken template.
        VerificationError: A file is missing or changed, or the configuration could do harm.
        EdgetuneError: ONNX Runtime GenAI failed, which shows while pieces are taken.
    """
    check_config(config)
    with computing_with(config.threads):
        threads = thread_count()
    opened = open_model(model)
    answering = opened.answering(config.adapter)
    encoding = answering.encoding | RowEncoding(raw_prompts=config.raw, content_as_text=config.content_as_text)
    encoder = load_encoder(opened.path, opened.manifest.tokenizer, encoding)
    input_ids = _encode(encoder, prompt, system, say)
    check_length(input_ids, opened.context_length)
    return text_pieces(encoder, _stream(opened, input_ids, config, answering, threads))


def generate_ids(model: Bundle | str | PathLike[str], input_ids: Sequence[int], max_new_tokens: int) -> list[int]:
    """Greedy continuation of token ids.

    Args:
        model: As `generate` takes it.
        input_ids: The prompt.
        max_new_tokens: Most ids to return.

    Returns:
        The new ids, without the one that ends the answer.

    Raises:
        UsageError: There is no model, or the prompt is empty or longer than the model takes.
        VerificationError: A file is missing or changed, or the configuration could do harm.
    """
    opened = open_model(model)
    check_length(input_ids, opened.context_length)
    search = SearchConfig(max_new_tokens)
    return list(_stream(opened, input_ids, search, opened.answering(), thread_count()))


def _encode(encoder: Encoder, prompt: str, system: str | None, say: Callable[[str], None]) -> list[int]:
    if not prompt:
        raise UsageError("the prompt is empty; give it some text")
    if not encoder.asks_raw:
        turns = [] if system is None else [Message("system", system)]
        turns.append(Message("user", prompt))
        if system and not encoder.shows(0, turns):
            raise UsageError("the model's chat template leaves the system's text out; put it into the prompt")
        for remark in encoder.remarks_of(turns):
            say(remark)
        return encoder.encode_prompt(turns)
    if system is not None:
        why = "the model has no chat template" if encoder.template is None else "the prompt is raw"
        raise UsageError(f"{why}, so a system text has no place; put it into the prompt")
    return encoder.encode_raw_prompt(prompt)


def _stream(
    model: GenaiModel, input_ids: Sequence[int], search: SearchConfig, answering: Answering, threads: int | None
) -> Iterator[int]:
    """Loads the model when the first id is asked for."""
    yield from LoadedModel(model, threads).stream(input_ids, search, answering)
