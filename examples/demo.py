"""The main job from end to end, as a user would do it: a base model learns to answer as a device does.

Everything runs through the `edgetune` command and works in `demo/` beside this folder. It ends with a table of
answers before and after, what each stage took, and whether the goals were met (exit code 1 if not).

    python examples/demo.py
"""

from __future__ import annotations

import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

EXAMPLES = Path(__file__).resolve().parent
WORK = EXAMPLES.parent / "demo"
TRAIN = EXAMPLES / "device_assistant" / "train.jsonl"
VALID = EXAMPLES / "device_assistant" / "valid.jsonl"
EDGETUNE = Path(sys.executable).with_name("edgetune")

LORA = "--rank 16 --alpha 32 --max-length 128"
TRAINING = "--steps 300 --batch-size 8 --learning-rate 3e-3 --schedule linear --warmup-steps 10"

LEAST_DROP = 0.30
"""By how much the held-out answer loss has to fall."""
ASKED, LEAST_VERBATIM = 10, 8
"""Trained prompts that the merged model is asked, and how many it has to answer word for word."""

INTERRUPTED = 130
"""Exit code of a run that Ctrl-C ended."""

console = Console()
timings: dict[str, float] = {}


@contextmanager
def stage(name: str) -> Iterator[None]:
    """Announce a stage and remember what it took, in seconds."""
    console.rule(name, align="left")
    started = time.monotonic()
    yield
    timings[name] = time.monotonic() - started


def edgetune(arguments: str) -> None:
    """Run a command in `demo/` and show it; a failure ends the demo with its exit code."""
    console.print(f"[bold]$ edgetune {arguments}[/bold]", highlight=False)
    finished = subprocess.run([EDGETUNE, *shlex.split(arguments)], cwd=WORK)
    if finished.returncode:
        sys.exit(finished.returncode)


def interrupt(arguments: str, line: str) -> None:
    """Run a command in `demo/` until it says a line that begins so, and press Ctrl-C; it has to end with 130."""
    console.print(f"[bold]$ edgetune {arguments}[/bold]", highlight=False)
    with subprocess.Popen(
        [EDGETUNE, *shlex.split(arguments)], cwd=WORK, stderr=subprocess.PIPE, text=True, encoding="utf-8"
    ) as process:
        assert process.stderr is not None
        if any(said.startswith(line) for said in process.stderr):
            process.send_signal(signal.SIGINT)
        console.print(process.stderr.read().strip(), highlight=False, markup=False)
    if process.returncode != INTERRUPTED:
        sys.exit(process.returncode or 1)


def ask_edgetune(arguments: list[str]) -> dict[str, Any]:
    """Run a command in `demo/` and read the JSON object that it prints."""
    finished = subprocess.run([EDGETUNE, *arguments, "--json"], cwd=WORK, stdout=subprocess.PIPE)
    if finished.returncode:
        sys.exit(finished.returncode)
    answer: dict[str, Any] = json.loads(finished.stdout)
    return answer


def held_out(*options: str) -> dict[str, Any]:
    """What `edgetune eval` measures on the held-out rows: `loss` in nats a token, `exact_match`, and more."""
    return ask_edgetune(["eval", "bundle", "--data", VALID.name, *options])


def answer(model: str, prompt: str) -> str:
    """What `model` says to `prompt`, greedily."""
    return str(ask_edgetune(["generate", model, "--prompt", prompt, "--max-new-tokens", "48"])["text"])


def questions_and_answers(rows: Path) -> list[tuple[str, str]]:
    """The question and the answer of each row."""
    lines = rows.read_text(encoding="ascii").splitlines()
    return [
        (question["content"], reply["content"]) for question, reply in (json.loads(line)["messages"] for line in lines)
    ]


def make_base() -> None:
    """Make the base model unless an earlier run has left it."""
    if (WORK / "base").is_dir():
        console.print(f"{WORK / 'base'} is already there")
        return
    # Threads that wait asleep: where other programs use the cores too, waiting awake makes training many times slower.
    environment = {"OMP_WAIT_POLICY": "PASSIVE", **os.environ}
    command = [sys.executable, str(EXAMPLES / "make_base.py"), str(WORK / "base")]
    finished = subprocess.run(command, env=environment)
    if finished.returncode:
        sys.exit(finished.returncode)


def compare(before: dict[str, str], trained: list[str], unseen: list[str]) -> None:
    """Print the same prompts answered before and after."""
    table = Table(title="The same prompts, before and after", show_lines=True)
    for heading in ("prompt", "base", "merged (fp32)", "base + adapter (int4)"):
        table.add_column(heading)
    for kind, prompts in (("trained", trained), ("held out", unseen)):
        for prompt in prompts:
            asked = f"{prompt}\n[dim]{kind}[/dim]"
            table.add_row(asked, before[prompt], answer("merged", prompt), answer("kept", prompt))
    console.print(table)


def main() -> None:
    """Run the stages and check the goals."""
    WORK.mkdir(exist_ok=True)
    for rows_file in (TRAIN, VALID):
        shutil.copy(rows_file, WORK)
    rows = questions_and_answers(TRAIN)
    spread = rows[:: len(rows) // ASKED][:ASKED]
    trained = [question for question, _ in spread[::4]]
    unseen = [question for question, _ in questions_and_answers(VALID)[::5]]

    with stage("base model"):
        make_base()
    with stage("prepare"):
        edgetune(f"prepare base --output bundle {LORA} --force")
    with stage("answers and loss before"):
        before = {prompt: answer("bundle", prompt) for prompt in [*trained, *unseen]}
        measured_before = held_out()
    with stage("train"):
        edgetune(f"train bundle --data {TRAIN.name} --valid {VALID.name} --output adapter {TRAINING} --force")
    with stage("train, interrupted"):
        interrupted = f"train bundle --data {TRAIN.name} --valid {VALID.name} --output resumed {TRAINING}"
        interrupt(f"{interrupted} --force", "step 150/")
        edgetune(f"{interrupted} --resume")
        whole, resumed = ((WORK / name / "adapter_model.safetensors").read_bytes() for name in ("adapter", "resumed"))
    with stage("loss after"):
        measured_after = held_out("--adapter", "adapter")
    with stage("export"):
        edgetune("export bundle --adapter adapter --output merged --merge --force")
        edgetune("export bundle --adapter adapter --output kept --keep-adapter --force")
    with stage("answers after"):
        compare(before, trained, unseen)
        verbatim = sum(answer("merged", question) == reply for question, reply in spread)
        held_out_verbatim = sum(answer("kept", question) == reply for question, reply in questions_and_answers(VALID))

    console.rule("summary", align="left")
    for name, seconds in timings.items():
        console.print(f"{name:26}{seconds:6.1f} s", highlight=False)
    console.print(f"{'all':26}{sum(timings.values()):6.1f} s", highlight=False)
    loss_before, loss_after = measured_before["loss"], measured_after["loss"]
    drop = 1 - loss_after / loss_before
    exact, asked = round(measured_after["exact_match"] * measured_after["rows"]), measured_after["rows"]
    goals = (
        (whole == resumed, "the run that was interrupted and went on learnt the same, byte for byte"),
        (drop >= LEAST_DROP, f"held-out answer loss {loss_before:.3f} → {loss_after:.3f}: {drop:.0%} lower"),
        (
            verbatim >= LEAST_VERBATIM,
            f"{verbatim} of {ASKED} trained prompts answered word for word by the merged model",
        ),
        (
            held_out_verbatim == exact,
            f"{held_out_verbatim} of {asked} held-out prompts answered word for word by base + adapter through GenAI, "
            f"{exact} by the graph of `edgetune eval`",
        ),
    )
    for met, finding in goals:
        console.print(f"[green]met   [/green] {finding}" if met else f"[red]missed[/red] {finding}", highlight=False)
    if not all(met for met, _ in goals):
        sys.exit(1)


if __name__ == "__main__":
    main()
