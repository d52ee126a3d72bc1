"""`edgetune conformance`: does a graph keep the rules of an accelerator's compiler."""

from __future__ import annotations

import sys
from collections import Counter
from dataclasses import asdict
from pathlib import Path

import click

from edgetune.cli.command import Command
from edgetune.cli.failures import exit_code_of
from edgetune.cli.inputs import PATH, bundle_at
from edgetune.cli.options import options_of
from edgetune.cli.output import print_json
from edgetune.config import ResultConfig
from edgetune.errors import IncompatibleError
from edgetune.text.printable import printable

EXAMPLES = """
edgetune conformance split
edgetune conformance model.onnx --json
"""


@click.command(cls=Command, epilog=EXAMPLES)
@click.argument("graph", type=PATH)
@options_of(ResultConfig, "printing")
def command(graph: Path, printing: ResultConfig) -> None:
    """Check GRAPH, an ONNX file or a split bundle, against Vitis AI's documented rules, and list what breaks them.

    Operators, opset, static shapes, symmetric int8, power-of-two scales. Vitis AI itself is not needed, and not asked:
    which operators its compiler places on the accelerator, it alone says. Exit code 4 when a rule is broken.
    """
    from edgetune.formats.trunk import GRAPH, read_trunk_info
    from edgetune.split.conformance import check_file

    path = graph
    if graph.is_dir():
        bundle = bundle_at(graph)
        read_trunk_info(bundle)
        path = bundle.file(GRAPH)
    found = check_file(path)
    if printing.json:
        print_json({"graph": path, "violations": [asdict(violation) for violation in found]})
    else:
        for violation in found:
            click.echo(printable(str(violation)))
        counts = ", ".join(f"{count} of {rule}" for rule, count in Counter(each.rule for each in found).items())
        click.echo(f"{path}: {len(found)} violations ({counts})" if found else f"{path}: keeps the rules of Vitis AI")
    if found:
        sys.exit(exit_code_of(IncompatibleError))
