"""What every command shares: examples in its help, suggestions for unknown options, finite numbers."""

from __future__ import annotations

import math
from textwrap import dedent
from typing import Any

import click

from edgetune.errors import UsageError
from edgetune.text.byte_size import parse_bytes
from edgetune.text.suggestion import did_you_mean


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
            names = [name.removeprefix("--") for param in self.get_params(ctx) for name in _long(param)]
            message = f"no such option '{option}'{did_you_mean(option.lstrip('-'), names, prefix='--')}"
            raise click.UsageError(message, ctx) from None

    def format_epilog(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Write the examples as they stand; click would fill them as a paragraph."""
        if self.epilog:
            with formatter.section("Examples"):
                for line in dedent(self.epilog).strip().splitlines():
                    formatter.write(f"{'':>{formatter.current_indent}}{line}\n")


class Finite(click.FloatRange):
    """A number in a range; `nan` and `inf`, which click lets pass, are none."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        """As click does, then refuse what is not finite."""
        number = super().convert(value, param, ctx)
        if not math.isfinite(number):
            self.fail(f"{value} is not a finite number", param, ctx)
        return number


class Size(click.ParamType):  # type: ignore[type-arg]
    """A size in bytes such as `3GB`; the text is kept as it was written."""

    name = "size"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> str:
        """Refuse what is no size."""
        try:
            parse_bytes(str(value))
        except UsageError as error:
            self.fail(str(error), param, ctx)
        return str(value)


POSITIVE = Finite(min=0, min_open=True)
NOT_NEGATIVE = Finite(min=0)
COUNT = click.IntRange(min=1)
SIZE = Size()

json_option = click.option("--json", "as_json", is_flag=True, help="Print JSON, for programs.")
quiet_option = click.option("--quiet", is_flag=True, help="Say nothing but the result and errors.")


def _long(param: click.Parameter) -> list[str]:
    return [name for name in (*param.opts, *param.secondary_opts) if name.startswith("--")]
