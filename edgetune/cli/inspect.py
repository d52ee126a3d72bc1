"""`edgetune inspect`: what a folder is, verified."""

from __future__ import annotations

import re
from collections import Counter
from dataclasses import asdict, fields
from pathlib import Path
from typing import TYPE_CHECKING

import click

from edgetune.cli.command import Command
from edgetune.cli.inputs import PATH, bundle_at
from edgetune.cli.options import flag_of, options_of
from edgetune.cli.output import cell, console, print_json
from edgetune.config import PlacementConfig, ResultConfig
from edgetune.errors import UsageError
from edgetune.formats.roles import INT8_STEP
from edgetune.runtimes.execution import ACCELERATING, Accelerator, WholePlan
from edgetune.text.byte_size import bytes_text

if TYPE_CHECKING:
    from edgetune.data.buckets import Bucket
    from edgetune.describe import Description
    from edgetune.formats.manifest import TensorSpec
    from edgetune.runtimes.placement import Placement

EXAMPLES = """
edgetune inspect bundle
edgetune inspect adapter
edgetune inspect model --json
edgetune inspect bundle --placement qnn
edgetune inspect bundle --placement qnn --buckets 4x128,1x512 --require-npu --json
"""

_MOST_POSITIONS = 1 << 15
"""Of all sequences of a shape together: a step of an accelerator has hundreds or thousands."""
_NUMBER = re.compile(r"(?<=\.)\d+(?=\.)")
"""A layer in a name such as `past_key_values.0.key`."""


@click.command(cls=Command, epilog=EXAMPLES)
@click.argument("folder", type=PATH)
@click.option(
    "--placement",
    type=click.Choice(list(ACCELERATING)),
    help="Compile the training step for this runtime's accelerator and say where each node runs.",
)
@options_of(PlacementConfig)
@options_of(ResultConfig, "printing")
def command(folder: Path, placement: str | None, config: PlacementConfig, printing: ResultConfig) -> None:
    """Say what FOLDER is: a bundle, an adapter or a model, with sizes, hashes and contracts.

    Every byte is compared with the manifest; a folder that is not what it says ends with exit code 5.
    """
    if placement is not None:
        _place(folder, placement, config, printing)
        return
    default = PlacementConfig()
    given = [flag_of(each) for each in fields(config) if getattr(config, each.name) != getattr(default, each.name)]
    if given:
        raise UsageError(f"{' and '.join(given)} belong to --placement; give that as well, or leave them away")
    from edgetune.describe import describe

    description = describe(folder)
    if printing.json:
        print_json(asdict(description))
    else:
        _show(description)


def _place(folder: Path, runtime: str, config: PlacementConfig, printing: ResultConfig) -> None:
    from edgetune.data.buckets import parse_buckets
    from edgetune.runtimes import find_runtime
    from edgetune.runtimes.placement import placement_record

    accelerator = Accelerator(config.device_type, config.soc_model, config.require_npu)
    found, facts = find_runtime(runtime), ACCELERATING[runtime]
    if not facts.takes(accelerator.device_type):
        devices = " or ".join(facts.device_types)
        raise UsageError(
            f"--placement {runtime} compiles for an {devices}, not for --device-type {accelerator.device_type}"
        )
    if not facts.soc_model and accelerator.soc_model is not None:
        raise UsageError(
            f"--soc-model {accelerator.soc_model} is a chip of Qualcomm's, which --placement {runtime} does not "
            "compile for; leave it away, or use --placement qnn"
        )
    shapes = parse_buckets(config.buckets) if config.buckets is not None else None
    found.abilities()
    bundle = bundle_at(folder)
    _check_shapes(shapes or [], bundle.manifest.max_length)
    place = found.place
    assert place is not None, "every runtime with an accelerator places"
    shapes = shapes or parse_buckets(f"1x{bundle.manifest.max_length}")
    plans = [WholePlan(accelerator=accelerator)]
    if "int8" in facts.precisions and any(graph.role == INT8_STEP for graph in bundle.manifest.graphs):
        plans.append(WholePlan("int8", accelerator))
    placements = [
        placement for plan in plans for shape in shapes for placement in place(bundle, plan, shape.batch, shape.length)
    ]
    if printing.json:
        print_json([placement_record(placement) for placement in placements])
    else:
        _show_placements(placements)


def _check_shapes(shapes: list[Bucket], longest: int) -> None:
    """Refuse what would be compiled for ever, and in gigabytes, for batches that no run has."""
    for shape in shapes:
        if shape.length > longest:
            raise UsageError(
                f"--buckets {shape} is longer than the bundle's rows, which have at most {longest:,} tokens; give at "
                f"most {longest:,} positions, or prepare with a larger --max-length"
            )
        if shape.batch > 1 and shape.batch * shape.length > _MOST_POSITIONS:
            raise UsageError(
                f"--buckets {shape} has {shape.batch * shape.length:,} positions, and {_MOST_POSITIONS:,} are the most "
                f"that are compiled; give at most {max(1, _MOST_POSITIONS // shape.length)} sequences"
            )


def _show_placements(placements: list[Placement]) -> None:
    from rich.table import Table

    runs = Table("graph", "shape", "provider", "device", "partitions", "nodes", "on the CPU")
    for placement in placements:
        shape = f"{placement.batch}x{placement.length}"
        pieces, taken, left = placement.accelerator_partitions, placement.accelerated, len(placement.fallen_back)
        names = map(cell, (placement.graph, shape, placement.provider, placement.device))
        runs.add_row(*names, str(pieces), str(taken), str(left))
    console().print(runs)
    if any(placement.fallen_back for placement in placements):
        left_out = Table("graph", "operator", "node", "why", title="On the CPU", title_justify="left")
        for placement in placements:
            for node in placement.fallen_back:
                why = node.reason or "the provider does not say"
                left_out.add_row(*map(cell, (placement.graph, node.operator, node.name, why)))
        console().print(left_out)


def _show(description: Description) -> None:
    from rich.table import Table

    terminal = console()
    facts = Table.grid(padding=(0, 2))
    for name, value in _facts(description):
        facts.add_row(cell(name, "bold"), cell(value))
    terminal.print(facts)
    if description.graphs:
        graphs = Table("graph", "file", "inputs", "outputs", title="Graphs", title_justify="left")
        for graph in description.graphs:
            graphs.add_row(*map(cell, (graph.role, graph.file, _tensors(graph.inputs), _tensors(graph.outputs))))
        terminal.print(graphs)
    files = Table("file", "size", "SHA-256", title="Files", title_justify="left")
    for file in description.files:
        files.add_row(*map(cell, (file.path, bytes_text(file.size), file.sha256)))
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
        slots = f"{lora.slots} slots, {lora.in_words()}, {lora.parameters:,} parameters"
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
