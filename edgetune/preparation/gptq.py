"""An int4 base rounded anew on rows: each linear layer by GPTQ, on what reaches it where the layers below are rounded.

The GenAI model is built before, with the scales of least squared error; its integers and scales are replaced where they
lie. One layer of the checkpoint's weights is in memory at a time, beside the hidden states of the rows.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from edgetune.data.encode import Example
from edgetune.formats.frozen_weights import HEAD, Stored
from edgetune.formats.genai import WEIGHTS
from edgetune.host.mapped_model import mapped_model
from edgetune.model.architecture import Architecture
from edgetune.model.error_feedback import feedback_factor, round_with_feedback
from edgetune.model.rounding import in_blocks, packed_points
from edgetune.preparation.rewrites.frozen_weights import index_weights

if TYPE_CHECKING:
    import torch

_MOST_TOKENS = 1 << 15
"""Tokens of the rows that are looked at: their hidden states are in memory."""


def round_on_rows(
    checkpoint: Path, folder: Path, architecture: Architecture, rows: Sequence[Example], say: Callable[[str], None]
) -> None:
    """Replace the integers and scales of a GenAI model's linear layers and head.

    A token counts the same in every layer, however large its hidden state is: norms divide by that, and the first token
    of a trained model, which can be ten thousand times larger than all others, would hide them.

    Args:
        checkpoint: The folder that the GenAI model was built from.
        folder: Holds the GenAI model, with an int4 base.
        architecture: Sizes of the model.
        rows: The rows, at least one; of many, some that are drawn evenly.
        say: Called with one line of text.
    """
    import torch

    model = mapped_model(checkpoint)
    index = index_weights(folder, architecture, "int4")
    data = np.memmap(folder / WEIGHTS, dtype=np.uint8, mode="r+")
    taken = drawn(rows)
    say(f"Rounding anew on {len(taken):,} of {len(rows):,} rows (GPTQ) …")
    rotary = type(model.model.rotary_emb)(config=model.config)  # the model's own has no numbers
    with torch.no_grad():
        hidden, places = [], []
        for example in taken:
            ids = torch.tensor([list(example.input_ids)])
            hidden.append(model.model.embed_tokens(ids).float())
            places.append(rotary(hidden[-1], torch.arange(ids.shape[1])[None]))
        for number, layer in enumerate(model.model.layers):
            layer.float()
            run = partial(_run_layer, layer, hidden, places)
            linear = {
                f"model.layers.{number}.{name}.weight": module
                for name, module in layer.named_modules()
                if isinstance(module, torch.nn.Linear)
            }
            for name, sums in _input_sums(linear, run).items():
                linear[name].weight.data = _replace(data, index.tensors[name], linear[name].weight, sums)
            hidden = run()
            model.model.layers[number] = torch.nn.Identity()  # its weights go
        norm, head = model.model.norm.float(), model.lm_head.float()
        head_sums = torch.zeros(head.in_features, head.in_features)
        for states in hidden:
            _add(head_sums, norm(states))
        _replace(data, index.tensors[HEAD], head.weight, head_sums.numpy())
    data.flush()


def drawn(rows: Sequence[Example]) -> Sequence[Example]:
    """As many of the rows as are looked at, evenly from all of them."""
    tokens = sum(len(row.input_ids) for row in rows)
    return rows[:: max(1, math.ceil(tokens / _MOST_TOKENS))]


def _run_layer(layer: Any, hidden: list[torch.Tensor], places: list[Any]) -> list[torch.Tensor]:
    """The layer's hidden states of each row."""
    return [_first(layer(states, position_embeddings=place)) for states, place in zip(hidden, places, strict=True)]


def _first(output: Any) -> torch.Tensor:
    """A layer's hidden states, which stand alone or are the first of what it gives."""
    states: torch.Tensor = output[0] if isinstance(output, tuple) else output
    return states


def _input_sums(linear: dict[str, Any], run: Callable[[], object]) -> dict[str, NDArray[np.float32]]:
    """What `_add` finds of all tokens that reach each linear layer while `run` runs."""
    import torch

    sums = {name: torch.zeros(module.in_features, module.in_features) for name, module in linear.items()}

    def add(name: str, _module: object, inputs: tuple[torch.Tensor, ...]) -> None:
        _add(sums[name], inputs[0])

    hooks = [module.register_forward_pre_hook(partial(add, name)) for name, module in linear.items()]
    run()
    for hook in hooks:
        hook.remove()
    return {name: found.numpy() for name, found in sums.items()}


def _add(sums: torch.Tensor, inputs: torch.Tensor) -> None:
    """Add x·xᵀ / mean(x²) of each token x to (in, in)."""
    tokens = inputs.reshape(-1, inputs.shape[-1])
    tokens = tokens / tokens.square().mean(-1, keepdim=True).sqrt().clamp_min(1e-30)
    sums.addmm_(tokens.T, tokens)


def _replace(data: NDArray[np.uint8], pieces: list[Stored], weight: torch.Tensor, sums: NDArray[np.float32]) -> Any:
    """Round a weight, and write it to its pieces in the file; returns what it is now."""
    import torch

    points, scales = round_with_feedback(weight.detach().numpy(), feedback_factor(sums))
    start = 0
    for piece in pieces:
        own = slice(start, start + piece.shape[0])
        start = own.stop
        assert piece.scales is not None  # for mypy: it is int4
        for offset, content in ((piece.offset, packed_points(points[own])), (piece.scales, scales[own])):
            stored = np.ascontiguousarray(content).reshape(-1).view(np.uint8)
            data[offset : offset + len(stored)] = stored
    values = in_blocks(points) * scales[..., None]
    return torch.from_numpy(values.reshape(points.shape))
