"""`edgetune inspect`: what a folder is, verified."""

from __future__ import annotations

import re
from collections import Counter
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

import click

from edgetune.byte_size import bytes_text
from edgetune.cli.command import Command, json_option
from edgetune.cli.inputs import PATH
from edgetune.cli.output import console, print_json

if TYPE_CHECKING:
    from edgetune.describe import Description
    from edgetune.manifest import TensorSpec

EXAMPLES = """
edgetune inspect bundle
edgetune inspect adapter
edgetune inspect model --json
"""

_NUMBER = re.compile(r"(?<=\.)\d+(?=\.)")
"""A layer in a name such as `past_key_values.0.key`."""


@click.command(cls=Command, epilog=EXAMPLES)
@click.argument("folder", type=PATH)
@json_option
def command(folder: Path, as_json: bool) -> None:
    """Say what FOLDER is: a bundle, an adapter or a model, with sizes, hashes and contracts.

    Every byte is compared with the manifest; a folder that is not what it says ends with exit code 5.
    """
    from edgetune.describe import describe

    description = describe(folder)
    if as_json:
        print_json(asdict(description))
    else:
        _show(description)


def _show(description: Description) -> None:
    from rich.table import Table
    from rich.text import Text

    terminal = console()
    facts = Table.grid(padding=(0, 2))
    for name, value in _facts(description):
        facts.add_row(Text(name, style="bold"), Text(value))
    terminal.print(facts)
    if description.graphs:
        graphs = Table("graph", "file", "inputs", "outputs", title="Graphs", title_justify="left")
        for graph in description.graphs:
            graphs.add_row(graph.role, Text(graph.file), Text(_tensors(graph.inputs)), Text(_tensors(graph.outputs)))
        terminal.print(graphs)
    files = Table("file", "size", "SHA-256", title="Files", title_justify="left")
    for file in description.files:
        files.add_row(Text(file.path), bytes_text(file.size), file.sha256)
    terminal.print(files)


def _facts(description: Description) -> list[tuple[str, str]]:
    state = "verified" if description.verified else "no manifest to verify against"
    facts = [("kind", f"{description.kind} ({state})"), ("path", str(description.path))]
    facts.append(("size", f"{bytes_text(description.size)} in {len(description.files)} files"))
    if base := description.base:
        identity = [base.name, f"{base.weights} weights" if base.weights else "", base.sha256]
        facts.append(("base", ", ".join(part for part in identity if part)))
    if description.weights:
        facts.append(("weights", description.weights))
    if shape := description.architecture:
        heads = f"{shape.num_attention_heads} heads ({shape.num_key_value_heads} for keys and values)"
        layers = f"{shape.num_hidden_layers} layers, hidden {shape.hidden_size}"
        facts.append(("architecture", f"{layers}, {heads}, vocabulary {shape.vocab_size:,}"))
    if lora := description.lora:
        slots = f"{lora.slots} slots, rank {lora.rank}, alpha {lora.alpha:g}, {lora.parameters:,} parameters"
        facts.append(("LoRA", f"{slots} on {', '.join(lora.target_modules)}"))
    if tokenizer := description.tokenizer:
        facts.append(("tokenizer", tokenizer.sha256))
        facts.append(("chat template", tokenizer.chat_template_sha256 or "none"))
    if description.max_length:
        facts.append(("longest row", f"{description.max_length:,} tokens"))
    if coverage := description.gradient_coverage:
        operators = ", ".join(f"{name} {count}" for name, count in sorted(coverage.items()))
        facts.append(("differentiated", operators))
    if description.adapters:
        facts.append(("adapters", ", ".join(description.adapters)))
    if description.losses:
        facts.append(("answer loss", ", ".join(f"{name} {loss:.4f}" for name, loss in description.losses.items())))
    if description.provenance:
        facts.append(("made with", "\n".join(f"{name} {value}" for name, value in description.provenance.items())))
    return facts


def _tensors(specs: list[TensorSpec]) -> str:
    """A line a tensor; layers that differ in their number only share one, LoRA parameters are counted."""
    own = [spec for spec in specs if ".lora_" not in spec.name]
    counts = Counter(f"{_NUMBER.sub('N', spec.name)} {spec.dtype} [{', '.join(map(str, spec.shape))}]" for spec in own)
    lines = [text if count == 1 else f"{text} for each of {count}" for text, count in counts.items()]
    if len(specs) > len(own):
        lines.append(f"{len(specs) - len(own)} for LoRA parameters")
    return "\n".join(lines)
