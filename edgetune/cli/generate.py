"""`edgetune generate`: an exported model answers a prompt."""

from __future__ import annotations

from pathlib import Path
from time import perf_counter

import click

from edgetune.cli.command import COUNT, Command, json_option
from edgetune.cli.inputs import PATH, model_at
from edgetune.cli.output import notices, print_json, printable
from edgetune.cli.run_options import content_as_text_option, threads_option
from edgetune.config import GenerateConfig

DEFAULT = GenerateConfig()

EXAMPLES = """
edgetune generate model --prompt "Dim the lights."
edgetune generate model --system "You are the voice of a kettle." --prompt "Are you hot?" --max-new-tokens 64
edgetune generate bundle --prompt "What did the base say before training?" --json
"""


@click.command(cls=Command, epilog=EXAMPLES)
@click.argument("model", type=PATH)
@click.option(
    "--prompt", required=True, help="What the user says; without a chat template or with --raw, the text to continue."
)
@click.option("--system", help="What the system says before it.")
@click.option(
    "--max-new-tokens",
    type=COUNT,
    default=DEFAULT.max_new_tokens,
    show_default=True,
    help="Longest answer, in tokens.",
)
@click.option(
    "--raw", is_flag=True, default=DEFAULT.raw, help="Go on with the prompt as it is, without the chat template."
)
@content_as_text_option
@threads_option
@json_option
def command(
    model: Path,
    prompt: str,
    system: str | None,
    max_new_tokens: int,
    raw: bool,
    content_as_text: bool,
    threads: int | None,
    as_json: bool,
) -> None:
    """Let MODEL answer a prompt, word by word as it comes.

    MODEL is what `edgetune export` wrote, or a bundle, whose base then answers. Decoding is greedy. A model
    whose adapter was trained with --raw-prompts or --content-as-text is asked so. With --json one object, whose `text`
    is the answer without special tokens.
    """
    model_at(model)
    from edgetune.generation import generate

    begin = perf_counter()
    config = GenerateConfig(max_new_tokens=max_new_tokens, raw=raw, content_as_text=content_as_text, threads=threads)
    pieces = generate(model, prompt, config, system=system, say=notices(quiet=False))
    if as_json:
        text = "".join(pieces)
        print_json({"text": text, "model": model, "seconds": perf_counter() - begin})
        return
    for piece in pieces:
        click.echo(printable(piece), nl=False)
    click.echo()
