"""Renders chat templates in a process of its own: `ChatTemplate` starts this file as a script and talks JSON lines.

A template comes with a model, so it is somebody else's program. Jinja's sandbox keeps it from reaching out; the
process boundary keeps it from hanging (the parent kills it) and from eating the memory (a limit of its own).
"""

from __future__ import annotations

import contextlib
import json
import signal
import sys
from collections.abc import Callable
from datetime import datetime
from functools import partial
from typing import Any

import jinja2
from jinja2 import nodes
from jinja2.exceptions import TemplateError
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

MEMORY_LIMIT = 1 << 30
"""Address space of this process, in bytes, where the system can limit it."""
OUTPUT_LIMIT = 1 << 24
"""Longest rendered conversation, in characters."""


class RefusedError(TemplateError):
    """The template called `raise_exception`: this conversation is not one that it takes."""


class GenerationBlock(Extension):
    """`{% generation %}` marks answers for other tools; here it only passes its body on."""

    tags = {"generation"}  # noqa: RUF012 - declared so by jinja2

    def parse(self, parser: Parser) -> list[nodes.Node]:
        """Replace the block by its body."""
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


def compile_template(source: str) -> jinja2.Template:
    """Compile a template in the environment that transformers' `apply_chat_template` gives it."""
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[GenerationBlock, loopcontrols]
    )
    environment.filters["tojson"] = _tojson
    environment.globals["raise_exception"] = _raise_exception
    environment.globals["strftime_now"] = lambda form: datetime.now().strftime(form)
    return environment.from_string(source)


def _tojson(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    # jinja2's own filter escapes HTML
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _raise_exception(message: str) -> None:
    raise RefusedError(str(message))


def render(template: jinja2.Template, variables: dict[str, Any]) -> str:
    """Render, but no more than `OUTPUT_LIMIT` characters.

    Raises:
        TemplateError: The template makes more than that, or fails otherwise.
    """
    pieces = []
    length = 0
    for piece in template.generate(variables):
        length += len(piece)
        if length > OUTPUT_LIMIT:
            raise TemplateError(f"makes more than {OUTPUT_LIMIT:,} characters")
        pieces.append(piece)
    return "".join(pieces)


def _answer(work: Callable[[], str]) -> dict[str, str]:
    try:
        return {"text": work()}
    except RefusedError as error:
        return {"refused": str(error)[:500]}
    except MemoryError:
        return {"broken": "needs too much memory"}
    except RecursionError:
        return {"broken": "is nested too deeply"}
    except Exception as error:  # whatever a template makes Python raise is the template's fault
        return {"broken": f"{type(error).__name__}: {error}"[:500]}


def main() -> None:
    """Read the template from the first line, then answer one conversation a line."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's to handle
    if sys.platform != "win32":
        import resource

        # Where the system knows no such limit (macOS), the parent's time limit has to do.
        with contextlib.suppress(OSError, ValueError):
            resource.setrlimit(resource.RLIMIT_AS, (MEMORY_LIMIT, MEMORY_LIMIT))
    setup = json.loads(sys.stdin.buffer.readline())
    compiled: list[jinja2.Template] = []

    def set_up() -> str:
        compiled.append(compile_template(setup["source"]))
        return ""

    print(json.dumps(_answer(set_up)), flush=True)
    for line in sys.stdin.buffer:
        variables = setup["variables"] | json.loads(line)
        print(json.dumps(_answer(partial(render, compiled[0], variables))), flush=True)


if __name__ == "__main__":
    main()
