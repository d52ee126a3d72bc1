"""`edgetune generate`: an exported model answers a prompt."""

from __future__ import annotations

from pathlib import Path
from time import perf_counter

import click

from edgetune.cli.command import Command
from edgetune.cli.inputs import PATH, model_at
from edgetune.cli.options import options_of
from edgetune.cli.output import notices, print_json
from edgetune.config import GenerateConfig, ResultConfig
from edgetune.text.printable import printable

EXAMPLES = """
edgetune generate model --prompt "Dim the lights."
edgetune generate model --system "You are the voice of a kettle." --prompt "Are you hot?" --max-new-tokens 64
edgetune generate model --prompt "Tell me about the moon." --temperature 0.8 --top-p 0.95 --seed 7
edgetune generate model --prompt "Dim the lights." --adapter kitchen
edgetune generate bundle --prompt "What did the base say before training?" --json
"""


@click.command(cls=Command, epilog=EXAMPLES)
@click.argument("model", type=PATH)
@click.option(
    "--prompt", required=True, help="What the user says; without a chat template or with --raw, the text to continue."
)
@click.option("--system", help="What the system says before it.")
@options_of(GenerateConfig)
@options_of(ResultConfig, "printing")
def command(model: Path, prompt: str, system: str | None, config: GenerateConfig, printing: ResultConfig) -> None:
    """Let MODEL answer a prompt, word by word as it comes.

    MODEL is what `edgetune export` wrote, or a bundle, whose base then answers. Each token is the likeliest unless
    there is a --temperature. A model whose adapter was trained with --raw-prompts or --content-as-text is asked so.
    With --json one object, whose `text` is the answer without special tokens.
    """
    model_at(model)
    from edgetune.generation import generate

    begin = perf_counter()
    pieces = generate(model, prompt, config, system=system, say=notices(quiet=False))
    if printing.json:
        text = "".join(pieces)
        print_json({"text": text, "model": model, "seconds": perf_counter() - begin})
        return
    for piece in pieces:
        click.echo(printable(piece), nl=False)
    click.echo()
