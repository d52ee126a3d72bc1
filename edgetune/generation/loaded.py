"""A model that ONNX Runtime GenAI has loaded once, and that answers one prompt after the other."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from edgetune.config import SearchConfig
from edgetune.errors import EdgetuneError, UsageError
from edgetune.formats.genai import Answering, GenaiModel


class LoadedModel:
    """Answers prompts with any adapter of its folder.

    Prompts are computed one by one. GenAI takes several at once only if they are equally long: padded ones get other
    answers (0.14.1, of 24 rows in batches of 4 six did), and rows of one length are few.

    Args:
        model: The verified folder.
        threads: How many threads compute; None leaves it to GenAI.

    Raises:
        EdgetuneError: GenAI cannot load it.
    """

    def __init__(self, model: GenaiModel, threads: int | None) -> None:
        import onnxruntime_genai as og

        self._path, self._ends = model.path, frozenset(model.eos_token_ids)
        self.context_length = model.context_length
        with self._failures():
            configuration = og.Config(str(model.path))
            if threads is not None:
                # In memory: the folder stays as it was verified.
                options = {"session_options": {"intra_op_num_threads": threads}}
                configuration.overlay(json.dumps({"model": {"decoder": options}}))
            self._model = og.Model(configuration)
            self._adapters = og.Adapters(self._model)
        self._known: set[Path] = set()

    def stream(self, input_ids: Sequence[int], search: SearchConfig, answering: Answering) -> Iterator[int]:
        """New ids, one by one, until one ends the answer, or `max_new_tokens` or the context's length is reached.

        Args:
            input_ids: The prompt, shorter than the context.
            search: How each next id is chosen.
            answering: The adapter that is active.

        Raises:
            EdgetuneError: GenAI failed.
        """
        import onnxruntime_genai as og

        with self._failures():
            parameters = og.GeneratorParams(self._model)
            most = min(self.context_length, len(input_ids) + search.max_new_tokens)
            parameters.set_search_options(num_beams=1, max_length=most, **_sampling(search))
            generator = og.Generator(self._model, parameters)
            if answering.adapter is not None:
                if answering.adapter not in self._known:
                    self._adapters.load(str(answering.adapter), answering.name)
                    self._known.add(answering.adapter)
                generator.set_active_adapter(self._adapters, answering.name)
            generator.append_tokens(np.array(input_ids, np.int32))
            while not generator.is_done():
                generator.generate_next_token()
                token = int(generator.get_next_tokens()[0])
                if token not in self._ends:
                    yield token

    @contextmanager
    def _failures(self) -> Iterator[None]:
        try:
            yield
        except RuntimeError as error:
            raise EdgetuneError(f"{self._path}: ONNX Runtime GenAI failed: {error}") from error


def check_length(input_ids: Sequence[int], context_length: int) -> None:
    """Refuse a prompt that leaves no place for an answer.

    Raises:
        UsageError: It has no tokens, or fills the context.
    """
    if not input_ids:
        raise UsageError("the prompt has no tokens; give it some text")
    if len(input_ids) >= context_length:
        raise UsageError(
            f"the prompt has {len(input_ids):,} tokens, "
            f"the model takes {context_length:,} together with the answer; shorten it"
        )


def _sampling(search: SearchConfig) -> dict[str, Any]:
    """GenAI's options; each is given, because it has defaults of its own, such as the 50 likeliest tokens."""
    if search.temperature is None:
        return {"do_sample": False}
    return {
        "do_sample": True,
        "temperature": search.temperature,
        "top_p": 1.0 if search.top_p is None else search.top_p,
        "top_k": search.top_k or 0,
        "random_seed": -1 if search.seed is None else search.seed,
    }
