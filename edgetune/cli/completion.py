"""`edgetune completion`: what a shell reads to complete commands and options."""

from __future__ import annotations

import click
from click.shell_completion import get_completion_class

from edgetune.cli.command import Command

EXAMPLES = """
edgetune completion bash
edgetune completion fish
"""
_PROGRAM, _VARIABLE = "edgetune", "_EDGETUNE_COMPLETE"
"""What a shell completes, and by which variable it asks edgetune, as click has it."""


@click.command(cls=Command, epilog=EXAMPLES)
@click.argument("shell", type=click.Choice(["bash", "zsh", "fish"]))
@click.pass_context
def command(ctx: click.Context, shell: str) -> None:
    """Print what lets SHELL complete commands, options and their choices.

    In ~/.bashrc or ~/.zshrc: `eval "$(edgetune completion bash)"`, or `zsh`. For fish, write what is printed to
    ~/.config/fish/completions/edgetune.fish.
    """
    kind = get_completion_class(shell)
    if kind is None:
        raise click.UsageError(f"click does not complete for {shell}")
    click.echo(kind(ctx.find_root().command, {}, _PROGRAM, _VARIABLE).source())
