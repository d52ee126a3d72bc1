"""What every command shares: examples in its help, and suggestions for unknown options."""

from __future__ import annotations

from collections.abc import Sequence
from textwrap import dedent
from typing import TYPE_CHECKING, Any, get_args

import click

from edgetune.text.suggestion import did_you_mean

if TYPE_CHECKING:
    from edgetune.config import HelpGroup


class Grouped(click.Option):
    """An option that `--help` shows under a heading.

    Args:
        group: The heading.
        declared: What click takes.
        settings: What click takes.
    """

    def __init__(self, declared: Sequence[str], *, group: HelpGroup, **settings: Any) -> None:
        super().__init__(declared, **settings)
        self.group = group


class Command(click.Command):
    """Says what an unknown option may have meant, and shows the epilog as examples, line by line."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        """As click does, with a better message for an unknown option."""
        written = list(args)
        try:
            return super().parse_args(ctx, args)
        except click.NoSuchOption as error:
            # click reads `-steps` as `-s`; look for what was really written.
            option = next((arg for arg in written if arg.startswith(error.option_name)), error.option_name)
            option = option.partition("=")[0]
            names = [name.removeprefix("--") for param in self.get_params(ctx) for name in _shown(param)]
            message = f"no such option '{option}'{did_you_mean(option.lstrip('-'), names, prefix='--')}"
            raise click.UsageError(message, ctx) from None

    def format_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Write the options under their headings, those without one first."""
        under: dict[HelpGroup, list[tuple[str, str]]] = {"other": []}
        for param in self.get_params(ctx):
            if isinstance(param, click.Option) and (record := param.get_help_record(ctx)) is not None:
                under.setdefault(param.group if isinstance(param, Grouped) else "other", []).append(record)
        with formatter.section("Options"):
            formatter.write_dl(under.pop("other"))
        if under:
            # Here, because the list of commands shows at once without it.
            from edgetune.config import HelpGroup

            for group in (group for group in get_args(HelpGroup) if group in under):
                with formatter.section(f"{group.capitalize()} options"):
                    formatter.write_dl(under[group])
        if isinstance(self, click.Group):
            self.format_commands(ctx, formatter)

    def format_epilog(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Write the examples as they stand; click would fill them as a paragraph."""
        if self.epilog:
            with formatter.section("Examples"):
                for line in dedent(self.epilog).strip().splitlines():
                    formatter.write(f"{'':>{formatter.current_indent}}{line}\n")


class Group(Command, click.Group):
    """A command with commands."""


def _shown(param: click.Parameter) -> list[str]:
    """The long names of an option, none of one that the help does not show."""
    if isinstance(param, click.Option) and param.hidden:
        return []
    return [name for name in (*param.opts, *param.secondary_opts) if name.startswith("--")]
