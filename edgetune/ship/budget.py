"""Sizes of a shipped folder against what its platform lets through."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from edgetune.errors import ResourceError
from edgetune.model.blocks import BLOCK_SIZE
from edgetune.ship.external_data import Span
from edgetune.ship.manifest import Budget
from edgetune.ship.platforms import CONTENTS, Content, Delivery, Platform
from edgetune.text.byte_size import bytes_text

_LINEAR = ".MatMul.weight"
"""Ends the names of linear weights in fp32; the others stay in fp32 in an int4 model as well."""
_INT4_SHARE = (0.5 + 4 / BLOCK_SIZE) / 4
"""Of a linear weight's fp32 bytes, in int4: half a byte a weight, and a float for each block."""


@dataclass(frozen=True)
class SizedFile:
    """A file of the shipped folder before it is written."""

    path: str
    size: int
    content: Content
    pack: str | None = None
    """Asset pack that it goes into."""
    delivery: Delivery | None = None
    """How the pack comes to the device."""


def sizes(files: Sequence[SizedFile]) -> dict[str, int]:
    """Bytes of every kind of content."""
    return {content: sum(file.size for file in files if file.content == content) for content in CONTENTS}


def budgets(platform: Platform, files: Sequence[SizedFile]) -> list[Budget]:
    """What the shipped folder takes of every limit of its platform."""
    return [
        Budget(
            limit.what,
            sum(f.size for f in files if f.content in limit.contents and limit.delivery in (None, f.delivery)),
            limit.bytes,
            limit.source,
        )
        for limit in platform.limits
    ]


def refuse_what_is_too_large(
    name: str, platform: Platform, files: Sequence[SizedFile], weights: Mapping[Span, str]
) -> None:
    """Refuse a shipped folder that its platform would not take.

    Args:
        name: The platform.
        platform: Its limits.
        files: All that is to be written.
        weights: What the graphs take from the bundle's weights, with the tensors' names.

    Raises:
        ResourceError: With every size that is too large, its limit, and what would fit.
    """
    problems = [
        f"{file.path} would have {bytes_text(file.size)}, at most {bytes_text(platform.largest_file)} are possible "
        f"({platform.largest_file_source})"
        for file in files
        if file.content == "weights" and file.size > platform.largest_file
    ]
    if problems:
        largest = max(weights, key=lambda span: span.length)
        problems.append(
            f"the largest tensor, {weights[largest]}, has {bytes_text(largest.length)}, and a tensor lies in one file; "
            "a model with a smaller vocabulary or hidden size would fit"
        )
    over = [budget for budget in budgets(platform, files) if budget.used > budget.limit]
    problems += [f"{b.what}: {bytes_text(b.used)}, at most {bytes_text(b.limit)} ({b.source})" for b in over]
    if over:
        listed = ", ".join(f"{content} {bytes_text(size)}" for content, size in sizes(files).items())
        problems.append(f"of that: {listed}; {_what_would_fit(over, weights)}")
    if problems:
        raise ResourceError("\n".join([f"the bundle is too large for the platform {name}:", *problems]))


def _what_would_fit(over: Sequence[Budget], weights: Mapping[Span, str]) -> str:
    linear = sum(span.length for span, tensor in weights.items() if tensor.endswith(_LINEAR))
    now = sum(span.length for span in weights)
    in_int4 = now - linear * (1 - _INT4_SHARE)
    most = now - max(budget.used - budget.limit for budget in over)
    if linear and in_int4 <= most:
        return f"a bundle of `prepare --base int4` would fit, with about {bytes_text(round(in_int4))} of weights"
    return f"a model with at most {bytes_text(max(0, most))} of weights would fit"
