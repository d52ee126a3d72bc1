"""`edgetune bundle`: what an app ships."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, get_args

import click

from edgetune.byte_size import bytes_text
from edgetune.cli.command import Command, json_option, quiet_option
from edgetune.cli.inputs import PATH, adapter_at, bundle_at
from edgetune.cli.output import console, notices, print_json
from edgetune.config import TargetConfig, TargetName

if TYPE_CHECKING:
    from edgetune.target.manifest import TargetManifest

DEFAULT = TargetConfig()

EXAMPLES = """
edgetune bundle bundle --target web --output site/model
edgetune bundle bundle --target android --output app/model --adapter adapter
edgetune bundle bundle --target ios --output Model --force --json
"""


@click.command(cls=Command, epilog=EXAMPLES)
@click.argument("bundle", type=PATH)
@click.option("--target", type=click.Choice(get_args(TargetName)), required=True, help="Where the app goes.")
@click.option("--output", type=PATH, required=True, help="Folder to write.")
@click.option(
    "--adapter",
    type=PATH,
    default=DEFAULT.adapter,
    help="Adapter that the app starts from; without it, one that changes nothing yet.",
)
@click.option("--force", is_flag=True, default=DEFAULT.force, help="Replace a target that is already there.")
@quiet_option
@json_option
def command(
    bundle: Path, target: TargetName, output: Path, adapter: Path | None, force: bool, quiet: bool, as_json: bool
) -> None:
    """Lay out what an app ships: graphs, weights in files that stores take, adapter, tokenizer, and target.json.

    The graphs compute what the bundle's compute, bit for bit. What is too large for the target is refused.
    """
    if adapter is not None:
        adapter_at(adapter)
    opened = bundle_at(bundle)
    from edgetune.target import lay_out

    made = lay_out(opened, target, output, TargetConfig(adapter=adapter, force=force), notices(quiet=quiet))
    if as_json:
        facts = made.manifest
        files = [{"path": file.path, "size": file.size, "pack": file.pack} for file in facts.files]
        budgets = [vars(budget) for budget in facts.budgets]
        print_json({"target": made.path, "sizes": facts.sizes, "budgets": budgets, "files": files})
        return
    _show(made.path, made.manifest)


def _show(path: Path, manifest: TargetManifest) -> None:
    from rich.table import Table

    click.echo(f"{path}: {manifest.target}, {bytes_text(sum(manifest.sizes.values()))} in {len(manifest.files)} files")
    parts = Table("part", "size")
    for part, size in manifest.sizes.items():
        parts.add_row(part, bytes_text(size))
    console().print(parts)
    if manifest.budgets:
        limits = Table("what the place takes", "limit", "used", "left")
        for budget in manifest.budgets:
            left = budget.limit - budget.used
            limits.add_row(budget.what, bytes_text(budget.limit), bytes_text(budget.used), bytes_text(left))
        console().print(limits)
