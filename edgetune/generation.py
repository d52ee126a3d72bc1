"""Answers from a model folder through ONNX Runtime GenAI."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from os import PathLike

from edgetune.config import GenerateConfig, check_config
from edgetune.data.answers import common_length
from edgetune.data.encode import Encoder, load_encoder
from edgetune.data.rows import Message
from edgetune.errors import EdgetuneError, UsageError
from edgetune.formats.bundle import Bundle
from edgetune.formats.genai import GenaiModel, open_model
from edgetune.formats.manifest import RowEncoding
from edgetune.machine.threads import computing_with, thread_count
from edgetune.text.pulse import silent

_ADAPTER = "default"
_INCOMPLETE = "\ufffd"
"""What the bytes of a character decode to that has more to come."""


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
        UsageError: A value of the configuration that cannot be meant; there is no model, the prompt is empty or longer
            than the model takes, `system` has no place, or so many threads cannot compute here.
        DataError: The chat template refuses the conversation.
        IncompatibleError: A format or version that this edgetune does not read, or a broken template.
        VerificationError: A file is missing or changed, or the configuration could do harm.
        EdgetuneError: ONNX Runtime GenAI failed, which shows while pieces are taken.
    """
    check_config(config)
    with computing_with(config.threads):
        threads = thread_count()
    opened = open_model(model)
    encoding = opened.encoding | RowEncoding(raw_prompts=config.raw, content_as_text=config.content_as_text)
    encoder = load_encoder(opened.path, opened.manifest.tokenizer, encoding)
    input_ids = _encode(encoder, prompt, system, say)
    _check_length(opened, input_ids)
    return text_pieces(encoder, _stream(opened, input_ids, config.max_new_tokens, threads))


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
    _check_length(opened, input_ids)
    return list(_stream(opened, input_ids, max_new_tokens, thread_count()))


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


def _check_length(model: GenaiModel, input_ids: Sequence[int]) -> None:
    if not input_ids:
        raise UsageError("the prompt has no tokens; give it some text")
    if len(input_ids) >= model.context_length:
        raise UsageError(
            f"the prompt has {len(input_ids):,} tokens, "
            f"the model takes {model.context_length:,} together with the answer; shorten it"
        )


def _stream(model: GenaiModel, input_ids: Sequence[int], max_new_tokens: int, threads: int | None) -> Iterator[int]:
    """New ids, one by one, until an end-of-sequence id comes, or `max_new_tokens` or the context length is reached."""
    import numpy as np
    import onnxruntime_genai as og

    try:
        configuration = og.Config(str(model.path))
        if threads is not None:
            # In memory: the folder stays as it was verified.
            options = {"session_options": {"intra_op_num_threads": threads}}
            configuration.overlay(json.dumps({"model": {"decoder": options}}))
        loaded = og.Model(configuration)
        parameters = og.GeneratorParams(loaded)
        most = min(model.context_length, len(input_ids) + max_new_tokens)
        parameters.set_search_options(do_sample=False, num_beams=1, max_length=most)
        generator = og.Generator(loaded, parameters)
        if model.adapter is not None:
            adapters = og.Adapters(loaded)
            adapters.load(str(model.adapter), _ADAPTER)
            generator.set_active_adapter(adapters, _ADAPTER)
        generator.append_tokens(np.array(input_ids, np.int32))
        while not generator.is_done():
            generator.generate_next_token()
            token = int(generator.get_next_tokens()[0])
            if token not in model.eos_token_ids:
                yield token
    except RuntimeError as error:
        raise EdgetuneError(f"{model.path}: ONNX Runtime GenAI failed: {error}") from error
