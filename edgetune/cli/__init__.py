"""The command line: one module a verb, imported only when its verb is called."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib import import_module

import click

import edgetune
from edgetune.cli.command import Command
from edgetune.cli.failures import tell_failure
from edgetune.cli.interruption import termination_interrupts
from edgetune.cli.output import replace_closed_streams
from edgetune.text.suggestion import did_you_mean


@dataclass(frozen=True)
class Verb:
    """One command."""

    module: str
    """Where its `command` is."""
    help: str
    """One line for the list of commands."""


VERBS = {
    "init": Verb("edgetune.cli.init", "Write a commented file with every option of prepare or train."),
    "prepare": Verb("edgetune.cli.prepare", "Turn a Phi-3 checkpoint into a bundle that a device can train (host)."),
    "split": Verb("edgetune.cli.split", "Make an int8 graph of a bundle's lower layers, for an accelerator (host)."),
    "data": Verb("edgetune.cli.data", "Make rows of other files, and check rows before they are trained on."),
    "plan": Verb("edgetune.cli.plan", "Predict memory, flash and time of a training run, for any device."),
    "train": Verb("edgetune.cli.train", "Train a LoRA adapter on rows of JSONL."),
    "import": Verb("edgetune.cli.import_", "Make an adapter of one that PEFT, mlx-lm, Azure ML or Kaito trained."),
    "preview": Verb("edgetune.cli.preview", "Show the token ids and labels that each row becomes."),
    "eval": Verb("edgetune.cli.eval", "Measure loss and perplexity of the answers."),
    "export": Verb("edgetune.cli.export", "Write a model folder for ONNX Runtime GenAI (host)."),
    "generate": Verb("edgetune.cli.generate", "Let an exported model answer a prompt."),
    "chat": Verb("edgetune.cli.chat", "Talk with an exported model, turn by turn."),
    "jobs": Verb("edgetune.cli.jobs", "Write what Azure or Kaito is given to train on its GPUs."),
    "ship": Verb("edgetune.cli.ship", "Lay out what an app ships: for a phone, a browser or a board."),
    "inspect": Verb("edgetune.cli.inspect", "Say what a bundle, adapter or model is, and verify it."),
    "report": Verb("edgetune.cli.report", "Show how adapters were trained, side by side, in one HTML file."),
    "runs": Verb("edgetune.cli.runs", "List the adapters below a folder, and what they came to."),
    "devices": Verb("edgetune.cli.devices", "List, show and check device profiles."),
    "conformance": Verb("edgetune.cli.conformance", "List what breaks the rules of Vitis AI in a graph (host)."),
    "doctor": Verb("edgetune.cli.doctor", "Say what is installed, what is missing, and how to get it."),
    "completion": Verb("edgetune.cli.completion", "Print what lets a shell complete commands and options."),
}
"""Every command, in the order of the work."""
FORMER = {"bundle": "ship"}
"""What commands were called; the old names work, and say so."""

_FLOW = """
edgetune prepare ./Phi-3.5-mini-instruct --output bundle
edgetune train bundle --data train.jsonl --output adapter
edgetune export bundle --adapter adapter --output model
edgetune generate model --prompt "Dim the lights."
"""


class LazyGroup(Command, click.Group):
    """Imports a command when it is called, and ends every failure as the exit codes of the documentation say."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        """The verbs, in the order of the work."""
        return list(VERBS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        """Import the module of a verb; None for a word that is no verb."""
        cmd_name = FORMER.get(cmd_name, cmd_name)
        if cmd_name not in VERBS:
            return None
        command: click.Command = import_module(VERBS[cmd_name].module).command
        return command

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """The list of verbs, from the table alone."""
        with formatter.section("Commands"):
            formatter.write_dl([(name, verb.help) for name, verb in VERBS.items()])

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        """As click does, with a suggestion for a word that is no verb."""
        word = args[0]
        if word in FORMER:
            click.echo(f"`edgetune {word}` is called `edgetune {FORMER[word]}` now", err=True)
            args = [FORMER[word], *args[1:]]
        elif word not in VERBS and not word.startswith("-"):
            raise click.UsageError(f"no such command '{word}'{did_you_mean(word, VERBS)}", ctx)
        return super().resolve_command(ctx, args)

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        """As click does; failures become an exit code."""
        replace_closed_streams()
        ctx.meta["edgetune.json"] = "--json" in args
        with _failures_end(ctx):
            return super().parse_args(ctx, args)

    def invoke(self, ctx: click.Context) -> None:
        """Run the command; failures become an exit code."""
        with _failures_end(ctx), termination_interrupts():
            super().invoke(ctx)
            sys.stdout.flush()


@contextmanager
def _failures_end(ctx: click.Context) -> Iterator[None]:
    try:
        yield
    except (click.exceptions.Exit, SystemExit, BrokenPipeError):
        # A reader that left early (`| head`) is click's to end quietly.
        raise
    except BaseException as error:
        ctx.exit(tell_failure(error, as_json=ctx.meta["edgetune.json"]))


@click.group(
    cls=LazyGroup,
    epilog=_FLOW,
    invoke_without_command=True,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110},
)
@click.version_option(edgetune.__version__, prog_name="edgetune", message="%(prog)s %(version)s")
@click.pass_context
def main(ctx: click.Context) -> None:
    """Take a Phi-3 model to an edge device and let it learn there.

    A bundle is made once, on a host. Training, evaluation and answers need nothing but the device.
    """
    if ctx.invoked_subcommand is None:
        click.echo(ctx.get_help(), err=True)
        ctx.exit(2)
