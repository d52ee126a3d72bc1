"""`edgetune chat`: a conversation with an exported model, line by line."""

from __future__ import annotations

import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager, suppress
from importlib import import_module
from pathlib import Path
from threading import Event, current_thread, main_thread
from types import FrameType
from typing import TYPE_CHECKING

import click

from edgetune.cli.command import Command
from edgetune.cli.inputs import PATH, model_at
from edgetune.cli.interruption import Interrupted
from edgetune.cli.options import options_of
from edgetune.cli.output import notices
from edgetune.config import ChatConfig
from edgetune.errors import DataError, UsageError
from edgetune.text.printable import printable
from edgetune.text.suggestion import did_you_mean

if TYPE_CHECKING:
    from edgetune.generation.chat import Chat

EXAMPLES = """
edgetune chat model
edgetune chat model --adapter kitchen --system "You are the voice of a kettle."
edgetune chat model --temperature 0.8 --seed 7
"""
_COMMANDS = {
    "/adapter NAME": "let another adapter answer; without a name, say which there are",
    "/reset": "forget all that was said",
    "/help": "show these lines",
    "/exit": "end the chat, as Ctrl-D does",
}
_WORDS = [command.split()[0] for command in _COMMANDS]


@click.command(cls=Command, epilog=EXAMPLES)
@click.argument("model", type=PATH)
@click.option("--system", help="What the system says before all turns.")
@options_of(ChatConfig)
def command(model: Path, system: str | None, config: ChatConfig) -> None:
    """Talk with MODEL: each line is a turn, and the answer appears as it comes.

    MODEL is what `edgetune export` wrote, or a bundle, whose base then answers. The oldest turns are left out where the
    conversation grows longer than the model takes. /help shows what a line can say beside that; Ctrl-C stops an answer.
    Lines may come through a pipe.
    """
    model_at(model)
    from edgetune.generation.chat import Chat

    say = notices(quiet=False)
    chat = Chat(model, config, system=system, say=say)
    interactive = sys.stdin.isatty() and sys.stdout.isatty()
    if interactive:
        say(f"{chat.adapter} answers; /help shows what else a line can say, Ctrl-D ends")
    for line in _lines(interactive=interactive):
        word, _, rest = line.partition(" ")
        if word == "/exit":
            return
        # What is wrong with one line does not end the others.
        try:
            if line.startswith("/") and not line.startswith("//"):
                for told in _obeyed(chat, word, rest.strip()):
                    say(told)
            else:
                _print_answer(chat, line.removeprefix("/"))
        except (UsageError, DataError) as error:
            say(f"error: {error}")


def _lines(*, interactive: bool) -> Iterator[str]:
    """What is typed, without blank lines, until it ends."""
    if interactive:
        with suppress(ImportError):
            import_module("readline")  # lets `input` edit its line and remember those before
    while True:
        try:
            line = _typed() if interactive else sys.stdin.readline()
        except UnicodeDecodeError as error:
            raise UsageError(f"what was said is not UTF-8: {error.reason}") from error
        if not line:
            return
        if line.strip():
            yield line.strip()


def _typed() -> str:
    """A line from a terminal, with its end; empty where Ctrl-D was typed. Ctrl-C throws away what stands in it."""

    def discard(number: int, frame: FrameType | None) -> None:
        raise _DiscardedError

    while True:
        try:
            with _interrupts(discard):
                return f"{input('> ')}\n"
        except _DiscardedError:
            click.echo()
        except EOFError:
            click.echo()
            return ""


class _DiscardedError(Exception):
    """Ctrl-C, while a line was typed."""


def _print_answer(chat: Chat, text: str) -> None:
    """Ctrl-C stops the answer, and what was said of it stays said; once more ends the command."""
    stopped = Event()

    def stop(number: int, frame: FrameType | None) -> None:
        if stopped.is_set():
            raise Interrupted
        stopped.set()

    with _interrupts(stop), closing(chat.answer(text)) as pieces:
        for piece in pieces:
            click.echo(printable(piece), nl=False)
            if stopped.is_set():
                click.echo(" …", nl=False)
                break
    click.echo()


@contextmanager
def _interrupts(handler: Callable[[int, FrameType | None], None]) -> Iterator[None]:
    """Let Ctrl-C call this meanwhile, where it is heard at all."""
    before = signal.getsignal(signal.SIGINT)
    if current_thread() is not main_thread() or before is signal.SIG_IGN:
        yield
        return
    signal.signal(signal.SIGINT, handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before or signal.SIG_DFL)


def _obeyed(chat: Chat, word: str, rest: str) -> Iterator[str]:
    """Do what a line that begins with a slash says; lines to be told."""
    match word:
        case "/adapter" if rest:
            chat.use(rest)
            yield f"{chat.adapter} answers"
        case "/adapter":
            yield f"{chat.adapter} answers; there are {', '.join([*chat.adapters, 'base'])}"
        case "/reset":
            chat.reset()
            yield "all is forgotten"
        case "/help":
            width = max(map(len, _COMMANDS))
            yield from (f"{name:{width}}  {meaning}" for name, meaning in _COMMANDS.items())
            yield "a line that begins with // says a text that begins with /"
        case _:
            raise UsageError(f"no such command {word!r:.40}{did_you_mean(word, _WORDS)}; /help shows them all")
