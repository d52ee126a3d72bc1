"""How many floating-point operations a training step has to do."""

from __future__ import annotations

from benchmarks.models import Model


def step_flops(model: Model, rows: int, length: int) -> int:
    """Useful operations of one LoRA training step; a multiplication and an addition count as two.

    Counted are matrix products only, each once however often a plan computes it (recomputed activations are work, but
    no use):

    - frozen projections: forward and the gradient of their input; of the lowest layer's qkv projection forward
      alone, because nothing below it is trained,
    - LoRA: x·Aᵀ and ·Bᵀ, the gradients of A and B, and those of their inputs (not below the lowest A),
    - attention: scores and context, and the two gradients of each, over the full square of length × length. Causal
      attention needs half of it, so a plan that skips the upper half does less than is counted here,
    - head: logits and the gradient of their input, for trained positions: a row's last one has no next token.

    Args:
        model: Sizes and rank.
        rows: Rows of the batch, without padding, all tokens trained.
        length: Tokens of a row.
    """
    size, rank = model.size, model.rank
    hidden, inner = size.hidden, size.intermediate
    projections = {
        "qkv": (hidden, size.qkv),
        "o": (hidden, hidden),
        "gate_up": (hidden, 2 * inner),
        "down": (inner, hidden),
    }
    frozen = 2 * 2 * sum(inputs * outputs for inputs, outputs in projections.values())
    lora = 2 * 3 * rank * sum(inputs + outputs for inputs, outputs in projections.values())
    attention = 2 * 2 * 3 * length * hidden
    below = 2 * (hidden * size.qkv + rank * hidden)
    tokens, trained = rows * length, rows * (length - 1)
    return tokens * (size.layers * (frozen + lora + attention) - below) + trained * 2 * 2 * size.vocabulary * hidden
